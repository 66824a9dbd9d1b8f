"""One forward call as it ran: when each module began and ended, and what those returned that are worth keeping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from genprune.layers.handing_out import Copies, rebuilt, same, versions
from genprune.layers.swapping import Slot

# Called or not, hosts index these and iterate over them: what they hold is seen in their place.
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass
class Moment:
    """One module's part of a call.

    Attributes:
        path, slot: where it hangs.
        inside: moments of its sub-modules, where a change lies inside; empty otherwise.
        calls: how often it was called.
        start, end: of its first and its last call, in ticks; infinity and -1 where it was not called.
        output: what it returned, if it is kept.
        versions: of the output's tensors at that time: an in-place edit raises them.
    """

    path: str
    slot: Slot | None
    inside: list[Moment] = field(default_factory=list)
    calls: int = 0
    start: float = math.inf
    end: float = -1
    output: Any = None
    versions: tuple[int, ...] | None = None

    @property
    def module(self) -> nn.Module:
        parent, name = self.slot
        return parent._modules[name]

    @property
    def kept(self) -> bool:
        return self.versions is not None

    def forget(self) -> None:
        self.output = self.versions = None

    def edited(self) -> bool:
        """Whether a kept tensor was changed in place since."""
        return self.kept and self.versions != versions(self.output)


class Timeline:
    """Watches one forward call, in a `with` block; no hook stays behind.

    Only what can be told apart by the paths of interest is watched: the modules there, those around them, and those
    that stand beside them on any level. Everything inside the others is one with them.

    Args:
        model: the model that will be called.
        paths: modules of interest, looked up before.
        keep: whether to keep outputs: of each module beside a path of interest that has not begun yet.
        copied: paths of modules whose output is edited in place later: a copy is kept, and none of what a module
            returns that did such an edit itself, since its edit has to be done again.
    """

    def __init__(
        self, model: nn.Module, paths: Iterable[str], keep: bool = True, copied: frozenset[str] = frozenset()
    ):
        self.model, self.keep, self.copied = model, keep, copied
        self.ahead = dict.fromkeys(paths)  # not begun yet
        self.around: dict[str, int] = {}  # path around some of them -> how many
        for path in self.ahead:
            for outer in _above(path):
                self.around[outer] = self.around.get(outer, 0) + 1
        self.moments: dict[str, Moment] = {}
        self.root = self._moment("", None, model)
        self.tick = 0
        self.running: dict[str, dict[str, tuple[int, ...]]] = {}  # path -> versions of originals when it began
        self.originals: dict[str, Any] = {}  # of outputs that are copied
        self.copies = Copies()

    def _moment(self, path: str, slot: Slot | None, module: nn.Module) -> Moment:
        moment = self.moments[path] = Moment(path, slot)
        if path in self.around:
            moment.inside = [self._moment(*child) for child in _children(path, module)]
        return moment

    def __enter__(self) -> Timeline:
        self.hooks = []
        for moment in self.moments.values():
            module = self.model if moment.slot is None else moment.module
            watcher = _Watcher(self, moment)
            self.hooks.append(module.register_forward_pre_hook(watcher.begins))
            # Registered last: gates and other hooks have had their say about the output.
            self.hooks.append(module.register_forward_hook(watcher.ends))
        return self

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()
        self.originals.clear()
        self.copies = None

    def edits(self) -> dict[str, tuple[int, ...]]:
        """Versions of the outputs that are edited in place, by path."""
        return {path: versions(output) for path, output in self.originals.items()}

    def start_of(self, paths: Iterable[str]) -> float:
        """When the first of some modules of interest began; a module that is never called begins with the one around.

        Infinity for no paths.
        """
        return min((self._start(path) for path in paths), default=math.inf)

    def _start(self, path: str) -> float:
        around = (self.moments[p] for p in (path, *_above(path)) if p in self.moments)
        return next((moment.start for moment in around if moment.calls), 0.0)

    def over_before(self, time: float) -> list[Moment]:
        """The largest modules that were over by then, of those whose output is kept where outputs are."""
        return list(_over(self.root.inside, time, self.keep))


def _over(moments: list[Moment], time: float, kept: bool) -> Iterator[Moment]:
    for moment in moments:
        if moment.calls and moment.end < time and (moment.kept or not kept):
            yield moment
        else:
            yield from _over(moment.inside, time, kept)


class _Watcher:
    """The hooks of one module."""

    def __init__(self, timeline: Timeline, moment: Moment):
        self.timeline, self.moment = timeline, moment

    def begins(self, module: nn.Module, inputs: tuple) -> None:
        line, moment = self.timeline, self.moment
        line.tick += 1
        moment.calls += 1
        moment.start = min(moment.start, line.tick)
        line.running[moment.path] = line.edits()
        if moment.path in line.ahead:
            del line.ahead[moment.path]
            for outer in _above(moment.path):
                line.around[outer] -= 1

    def ends(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        line, moment = self.timeline, self.moment
        line.tick += 1
        moment.end = line.tick
        before, now = line.running.pop(moment.path, {}), line.edits()
        moment.forget()  # one that runs twice returns twice: it is computed anew each time
        edited = any(now[path] != then for path, then in before.items())
        if edited or not (line.keep and moment.calls == 1 and self._is_of_use()):
            return
        copied = moment.path in line.copied
        try:
            # Containers are rebuilt, so that a list that the host empties later stays full here.
            kept = rebuilt(output, line.copies if copied else same)
            moment.versions = versions(kept)
        except TypeError:  # holds something that cannot be handed out twice
            return
        moment.output = kept
        if copied:
            line.originals[moment.path] = output

    def _is_of_use(self) -> bool:
        """Whether something of interest is ahead in the module that runs around this one."""
        around = next((path for path in _above(self.moment.path) if path in self.timeline.running), None)
        return around is not None and self.timeline.around.get(around, 0) > 0


def _above(path: str) -> Iterator[str]:
    """Paths of the modules around one, nearest first, the root's empty path last."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _children(path: str, module: nn.Module) -> Iterator[tuple[str, Slot, nn.Module]]:
    for name, child in module._modules.items():
        if child is None:
            continue
        inner = f"{path}.{name}" if path else name
        if isinstance(child, CONTAINERS):
            yield from _children(inner, child)
        else:
            yield inner, (module, name), child
