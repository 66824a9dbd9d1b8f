"""Outputs of a model under many changes, without computing again what runs before each change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from genprune.errors import GenpruneError
from genprune.layers.handing_out import Copies, Recalled, rebuilt, same
from genprune.layers.swapping import placed, slot_of, swapped
from genprune.layers.timeline import Moment, Timeline

Changes = Mapping[str, Mapping[str, nn.Module]]
_NOTHING: Mapping[str, nn.Module] = {}


def changed_outputs(
    model: nn.Module,
    inputs: Mapping[str, Any] | Tensor,
    changes: Changes,
    *,
    reuse: bool = True,
    base: Mapping[str, nn.Module] = _NOTHING,
) -> Iterator[tuple[str, Tensor]]:
    """The model's output, then its output under each change alone, without gradients.

    What runs before the first module of a change is the same as in the unchanged model. That model runs once and the
    outputs of its modules are kept where a change needs them; for each change every module that was over by then
    returns what it returned, and the rest of the host's own code runs. The outputs are those of running the whole
    changed model, to the bit where the device computes the same numbers twice (CPUs do). Between two results the
    model is as it was given.

    Memory: at most one output of each module beside a changed one, on every level (for the branches of a transformer:
    of its norms, attentions, feed-forwards and blocks), less with each change that is done. Pass fewer changes at a
    time, or fewer rows, where that is too much.

    Args:
        model: in evaluation mode, on the device of the inputs; dense, cut, gated or with adapters. Hooks of a module
            that is not run again act once, in the first run.
        inputs: keyword arguments, or the one positional tensor. Not changed, also where a host empties a list.
        changes: name -> {module path: what stands there}, see `removal` and `swapped`. A name is not empty.
        reuse: False runs the whole model for every change: slower, and a check.
        base: changes that are in force all the time. Other paths are looked up in the model so changed.

    Yields:
        `("", output)` first, then `(name, output)` of each change, in the order in which they begin to act. Host
        classes that return more than a tensor give their sample.

    Raises:
        GenpruneError: a path is no module of the model, a name is empty, or the model returns no tensor.
    """
    if "" in changes:
        raise GenpruneError(
            "a change has an empty name, which stands for the unchanged model; expected a text. Name it after its "
            "site, e.g. changes={site.name: removal(model, site)}."
        )
    sweep = _Sweep(model, inputs, changes, base, reuse)
    yield "", sweep.recorded()
    while sweep.order:
        name = sweep.order[0]
        output = sweep.changed(name)
        sweep.done()
        yield name, output


class _Sweep:
    """Changes that are still to do, in order of execution, and what is kept for them."""

    def __init__(self, model: nn.Module, inputs, changes: Changes, base: Mapping[str, nn.Module], reuse: bool):
        self.model, self.inputs, self.changes, self.base, self.reuse = model, inputs, changes, base, reuse
        self.order = list(changes)
        self.copied: frozenset[str] = frozenset()
        self.needs: dict[str, list[Moment]] = {}
        self.kept: list[Moment] = []
        with swapped(model, base):
            self.slots = {p: slot_of(model, p) for change in changes.values() for p in change}

    def recorded(self) -> Tensor:
        """Run the unchanged model and keep what the changes need; its output."""
        paths = {path for name in self.order for path in self.changes[name]}
        with swapped(self.model, self.base):
            timeline = Timeline(self.model, paths, self.reuse, self.copied)
            with timeline:
                output = called(self.model, self.inputs)
        starts = {name: timeline.start_of(self.changes[name]) for name in self.order}
        self.order.sort(key=starts.__getitem__)
        self.needs = {name: timeline.over_before(starts[name]) if self.reuse else [] for name in self.order}
        self.kept = [moment for moment in timeline.moments.values() if moment.kept]
        self._drop()
        return output

    def changed(self, name: str) -> Tensor:
        """The output under one change."""
        self._restore()
        change = self.changes[name]
        with swapped(self.model, self.base):
            copies = Copies()
            recalled = [
                (moment.slot, Recalled(moment.module, moment.output, copies if moment.path in self.copied else same))
                for moment in self.needs[name]
            ]
            stand_ins = [(self.slots[path], module) for path, module in change.items()]
            with placed(stand_ins, of=self.model), placed(recalled):
                return called(self.model, self.inputs)

    def _restore(self) -> None:
        """Run the unchanged model again where something that is kept was edited in place since, and keep a copy."""
        while edited := {moment.path for moment in self.kept if moment.edited()} - self.copied:
            self.copied |= edited
            self.recorded()

    def done(self) -> None:
        """Take the first change off the list, and drop what only it needed."""
        del self.needs[self.order.pop(0)]
        self._drop()

    def _drop(self) -> None:
        """Forget every output that no change needs any more."""
        needed = {id(moment) for moments in self.needs.values() for moment in moments}
        for moment in self.kept:
            if id(moment) not in needed:
                moment.forget()
        self.kept = [moment for moment in self.kept if moment.kept]


def called(model: nn.Module, inputs: Mapping[str, Any] | Tensor) -> Tensor:
    """The output tensor of one call, without gradients. Raises `GenpruneError` where there is none."""
    # Out of inference mode, where tensors do not know that they were edited in place.
    with torch.inference_mode(False), torch.no_grad():
        if isinstance(inputs, Mapping):
            output = model(**{name: rebuilt(value, strict=False) for name, value in inputs.items()})
        else:
            output = model(inputs)
    found = output[0] if isinstance(output, (tuple, list)) else getattr(output, "sample", output)
    if not isinstance(found, Tensor):
        raise GenpruneError(
            f"{type(model).__name__} returned a {type(output).__name__}; expected a tensor, a tuple that begins with "
            "one, or an output with a `sample`. Wrap the model in a module that returns such."
        )
    return found
