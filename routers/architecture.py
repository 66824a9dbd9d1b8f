"""`ArchitectureSpace`: what an architecture code says about one model, entry by entry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from genprune.allocation.request import NARROWING, default_kinds
from genprune.costs import meta_copy
from genprune.costs import operating_point as operating_point_of
from genprune.errors import GenpruneError, NoMatchingSites, PlanMismatch
from genprune.families import denoiser, family_of, find_sites
from genprune.routers import relaxation
from genprune.sites import Sites

REMOVING = ("branch", "block", "wrapper")


@dataclass(frozen=True)
class WidthVector:
    """The entries of one site: unit `u` follows entry `entry_of[u]` of the code's part `first ... first + entries`.

    Args:
        site: its name.
        units, entries: how many; a site of many units has its units in groups.
        first: position of the first entry in the code.
        above: positions in `ArchitectureSpace.depth` of what contains the site.
    """

    site: str
    units: int
    entries: int
    first: int
    above: tuple[int, ...] = ()

    @property
    def part(self) -> slice:
        return slice(self.first, self.first + self.entries)


@dataclass(frozen=True)
class ArchitectureSpace:
    """The layout of an architecture code of length D: all width vectors first, then the depth gates in their order.

    Args:
        host: class name of the model.
        widths: one for each site that narrows.
        depth: names of the sites that go as a whole; the first never goes, the last goes first.
        entry_of: site name -> entry of each unit, int64 of shape `(units,)`.
        temperature, offset: T and b of `relaxation`.

    Reference:
        APTP (arXiv 2406.12042), section 3: width gates in groups, ordered depth gates.
    """

    host: str
    widths: tuple[WidthVector, ...]
    depth: tuple[str, ...]
    entry_of: Mapping[str, Tensor] = field(repr=False)
    temperature: float = 0.4
    offset: float = 3.0

    @classmethod
    def of(
        cls,
        target: Any,
        kinds: Sequence[str] | None = None,
        depth: bool | Sequence[str] = True,
        groups: int = 32,
        scores: Mapping[str, Tensor] | None = None,
        temperature: float = 0.4,
        offset: float = 3.0,
    ) -> ArchitectureSpace:
        """The space of a model's sites.

        Args:
            target: a supported model, or a pipeline.
            kinds: kinds of sites that narrow; None: all that the model has. Sites of one unit have no entry.
            depth: True: whatever can go as a whole and is in nothing else that can (the ResNets and transformers of a
                U-Net, the blocks of a transformer); patterns of site names; False: nothing.
            groups: most entries of one site. APTP has 32 groups of neurons a feed-forward layer.
            scores: site name -> `(size,)`, higher = keep: groups are of units of similar score. Without, of
                neighbouring units, as in APTP.

        Raises:
            NoMatchingSites: a kind or pattern matches nothing, or nothing is left.
        """
        model = denoiser(target)
        sites = find_sites(model)
        narrowing = _narrowing(sites, kinds)
        removable = _in_order(model, _removable(sites, depth))
        widths, entry_of, first = [], {}, 0
        for name, site in narrowing.items():
            entries = min(site.size, groups)
            above = tuple(removable.index(parent) for parent in sites.ancestors(name) if parent in removable)
            widths.append(WidthVector(name, site.size, entries, first, above))
            entry_of[name] = _grouped(site.size, entries, None if scores is None else scores.get(name))
            first += entries
        if not widths and not removable:
            raise NoMatchingSites(
                f"no site of {sites.host} narrows by more than one unit or goes as a whole with kinds={kinds} and "
                f"depth={depth}; expected some. See gp.find_sites(model)."
            )
        return cls(sites.host, tuple(widths), tuple(removable), entry_of, temperature, offset)

    @property
    def length(self) -> int:
        """D, the number of entries."""
        return sum(self.lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of each vector: the widths, and one for all depth gates where there are some."""
        return tuple(vector.entries for vector in self.widths) + ((len(self.depth),) if self.depth else ())

    @property
    def depth_part(self) -> slice:
        return slice(self.length - len(self.depth), self.length)

    def start(self, shares: Mapping[str, Tensor] | None = None, scale: float = 1.0) -> Tensor:
        """The logits to begin at, shape `(D,)`: everything stays, the depth with a margin.

        Args:
            shares: site name -> kept units, bool or share of shape `(size,)`, of a plan to begin around: entries lie
                `scale` above or below the threshold, those that it keeps in part between.
        """
        logits = torch.zeros(self.length)
        if self.depth:
            # p of the last gate is softmax(logits)[0]: one half, far above the threshold
            logits[self.depth_part.start] = math.log(max(1, len(self.depth) - 1))
        if shares is None:
            return logits
        middle = relaxation.threshold(self.offset)
        for vector in self.widths:
            kept = shares.get(vector.site)
            kept = torch.ones(vector.units) if kept is None else kept.float()
            index = self.entry_of[vector.site]
            total = torch.zeros(vector.entries).index_add_(0, index, kept)
            logits[vector.part] = middle + scale * (2 * total / torch.bincount(index, minlength=vector.entries) - 1)
        return logits

    def gates(self, logits: Tensor, noise: Tensor | float = relaxation.MEDIAN_NOISE) -> dict[str, Tensor]:
        """Straight-through 0/1 gates of codes.

        Args:
            logits: shape `(rows, D)`.
            noise: Gumbel draws of the same shape; default: the median, which draws nothing.

        Returns:
            Site name -> `(rows, size)`, exactly 0 or 1, with the gradient of the relaxation. A width vector that would
            lose everything keeps the entry of its largest logit.
        """
        soft = self.relaxed(logits, noise)
        hard = (soft >= 0.5).to(soft.dtype)
        hard[:, self.depth_part.start : self.depth_part.start + len(self.depth[:1])] = 1  # the first never goes
        gates = {}
        for vector in self.widths:
            part, revived = soft[:, vector.part], hard[:, vector.part]
            best = torch.zeros_like(revived).scatter_(-1, logits[:, vector.part].argmax(-1, keepdim=True), 1.0)
            revived = torch.where(revived.any(-1, keepdim=True), revived, best)
            index = self.entry_of[vector.site].to(soft.device)
            gates[vector.site] = relaxation.straight_through(part, revived)[:, index]
        depth = relaxation.straight_through(soft, hard)[:, self.depth_part]
        return gates | {name: depth[:, [index]] for index, name in enumerate(self.depth)}

    def relaxed(self, logits: Tensor, noise: Tensor | float = relaxation.MEDIAN_NOISE) -> Tensor:
        """The soft gates m of every entry, shape `(..., D)`."""
        plain = logits[..., : self.depth_part.start]
        if self.depth:
            plain = torch.cat([plain, relaxation.depth_logits(logits[..., self.depth_part])], -1)
        return relaxation.relaxed(plain, noise, self.temperature, self.offset)

    def keep(self, logits: Tensor, shift: float = 0.0) -> dict[str, Tensor]:
        """The units that one code keeps, by threshold: no noise, so that a code is one architecture.

        Args:
            logits: shape `(D,)`.
            shift: added to the logits of all gates (to the log-odds of depth), which moves them against the budget.

        Returns:
            Site name -> bool of shape `(size,)`, for every site of the space.
        """
        noise = relaxation.MEDIAN_NOISE + shift
        return {name: gate[0].bool() for name, gate in self.gates(logits.detach().double().cpu()[None], noise).items()}

    def features(self, logits: Tensor) -> Tensor:
        """phi of codes, L2-normalised, so that the cosine of two codes is their inner product; no noise.

        Each entry counts with its depth gate and 1 / sqrt(length of its vector), so that long vectors do not drown the
        others.

        Args:
            logits: shape `(..., D)`.

        Returns:
            Float64 of the same shape.
        """
        features = self.relaxed(logits.double())
        if self.depth:
            depth = features[..., self.depth_part]
            stays = torch.cat([depth, torch.ones_like(depth[..., :1])], -1)
            for index in self._depth_above:
                features = features * stays[..., index]
        return nn.functional.normalize(features / self._root_lengths.to(features.device), dim=-1)

    @cached_property
    def _depth_above(self) -> Tensor:
        """Which depth gates each entry counts with, int64 `(most, D)`; one past the last gate: none."""
        most = max((len(vector.above) for vector in self.widths), default=0)
        found = torch.full((most, self.length), len(self.depth))
        for vector in self.widths:
            for row, index in enumerate(vector.above):
                found[row, vector.part] = index
        return found

    @cached_property
    def _root_lengths(self) -> Tensor:
        """The square root of the length of each entry's vector, float64 `(D,)`."""
        lengths = torch.tensor(self.lengths)
        return lengths.double().sqrt().repeat_interleave(lengths)

    def tensors(self) -> dict[str, Tensor]:
        """Index tensors by site name, as a file holds them beside `to_json`."""
        return {name: index.to(torch.int32) for name, index in self.entry_of.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data without the index tensors."""
        return {
            "host": self.host,
            "widths": [[v.site, v.units, v.entries, v.first, list(v.above)] for v in self.widths],
            "depth": list(self.depth),
            "temperature": self.temperature,
            "offset": self.offset,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ArchitectureSpace:
        """Read what `to_json` and `tensors` gave. Raises `PlanMismatch` where the two do not fit."""
        try:
            widths = tuple(WidthVector(s, int(u), int(e), int(f), tuple(a)) for s, u, e, f, a in data["widths"])
            entry_of = {vector.site: tensors[vector.site].long() for vector in widths}
            space = cls(
                str(data["host"]),
                widths,
                tuple(data["depth"]),
                entry_of,
                float(data["temperature"]),
                float(data["offset"]),
            )
            ends = [vector.first + vector.entries for vector in widths]
            whole = [vector.first for vector in widths] == [0, *ends[:-1]][: len(widths)]
            for vector in widths:
                index = entry_of[vector.site]
                whole &= len(index) == vector.units and 0 <= int(index.min()) <= int(index.max()) < vector.entries
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise PlanMismatch(
                f"the architecture space lacks a part or has one of the wrong type ({error}); expected what "
                "ArchitectureSpace.to_json and tensors gave. Train the router again, or restore its files."
            ) from None
        if not whole:
            raise PlanMismatch(
                "the architecture space names other widths than its index tensors; expected files of one router. "
                "Restore them from where they were saved."
            )
        return space


def _narrowing(sites: Sites, kinds: Sequence[str] | None) -> Sites:
    chosen = default_kinds(sites) if kinds is None else tuple(kinds)
    if wrong := [kind for kind in chosen if kind not in NARROWING]:
        raise NoMatchingSites(
            f"sites of kind '{wrong[0]}' do not narrow; expected some of {', '.join(NARROWING)}. What goes as a whole "
            "is chosen by depth."
        )
    several = [site for site in (sites.of_kind(*chosen) if chosen else {}).values() if site.size > 1]
    return Sites.of(sites.host, several)


def _removable(sites: Sites, depth: bool | Sequence[str]) -> list[str]:
    if depth is False:
        return []
    if depth is True:
        return [name for name, site in sites.items() if site.kind in REMOVING and site.parent is None]
    matched = sites.match(*([depth] if isinstance(depth, str) else depth))
    if wrong := [name for name, site in matched.items() if site.kind not in REMOVING]:
        raise NoMatchingSites(
            f"depth matches '{wrong[0]}', which does not go as a whole; expected sites of kind {', '.join(REMOVING)}. "
            "Narrow the patterns, such as '*:block'."
        )
    return list(matched)


def _in_order(model: nn.Module, names: list[str]) -> list[str]:
    """From the last to go to the first: the middle of the network goes before its ends (APTP's order)."""
    if not names:
        return []
    called = _call_order(model, names)
    middle = (len(called) - 1) / 2
    # the end of the network stays longer than its beginning
    return sorted(called, key=lambda name: (-abs(called.index(name) - middle), -called.index(name)))


class _Calls:
    """Notes the order in which modules are called."""

    def __init__(self) -> None:
        self.seen: dict[str, None] = {}

    def watch(self, module: nn.Module, name: str) -> None:
        module._genprune_called_as = name
        module.register_forward_pre_hook(self.hook)

    def hook(self, module: nn.Module, inputs: tuple) -> None:
        self.seen.setdefault(module._genprune_called_as)


def _call_order(model: nn.Module, names: list[str]) -> list[str]:
    """The sites in the order in which one forward call on the meta device reaches them."""
    meta, calls = meta_copy(model), _Calls()
    for name in names:
        calls.watch(meta.get_submodule(name.rsplit(":", 1)[0]), name)
    with torch.no_grad():
        meta(**family_of(meta).example_inputs(meta, operating_point_of(model), "meta", torch.float32))
    if missing := [name for name in names if name not in calls.seen]:
        raise GenpruneError(
            f"'{missing[0]}' was not called in a forward pass of {type(model).__name__}; expected a module that is. "
            "Leave it out of depth."
        )
    return list(calls.seen)


def _grouped(units: int, entries: int, scores: Tensor | None) -> Tensor:
    """Entry of each unit: groups of as equal size as can be, of neighbours or of similar scores (best first)."""
    entry = torch.arange(units) * entries // units
    if scores is None:
        return entry
    order = torch.sort(scores.detach().cpu().float(), descending=True, stable=True).indices
    return torch.empty_like(entry).scatter_(0, order, entry)
