"""Groups of consecutive layers of which a fixed number stays: what learned depth chooses within, and what it costs."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genprune.errors import GenpruneError
from genprune.sites import Sites

MOST_CHOICES = 5_000  # of one group: each has a logit, and a group of 14 with 7 kept has 3,432


@dataclass(frozen=True)
class DepthGroup:
    """Consecutive layers of which `kept` stay.

    Args:
        layers: site names, in order.
        kept: how many of them stay, 0 to all.

    Raises:
        GenpruneError: `kept` is out of range, or there are more than `MOST_CHOICES` ways to choose.
    """

    layers: tuple[str, ...]
    kept: int

    def __post_init__(self) -> None:
        if not self.layers or not 0 <= self.kept <= len(self.layers):
            raise GenpruneError(
                f"a group of {len(self.layers)} layers keeps {self.kept}; expected 0 to {len(self.layers)}, "
                "of at least one layer. Pass groups=(kept, layers), such as (1, 2)."
            )
        if self.choices > MOST_CHOICES:
            raise GenpruneError(
                f"there are {self.choices:,} ways to keep {self.kept} of {len(self.layers)} layers; expected at most "
                f"{MOST_CHOICES:,}, because each gets a logit. Pass a smaller group, such as groups=(2, 4)."
            )

    @property
    def choices(self) -> int:
        """Ways to keep that many: C(m, n)."""
        return math.comb(len(self.layers), self.kept)

    @property
    def masks(self) -> Tensor:
        """Every way, in lexicographic order of the kept layers: 0/1 floats of shape `(choices, layers)`."""
        masks = torch.zeros(self.choices, len(self.layers))
        for choice, kept in enumerate(itertools.combinations(range(len(self.layers)), self.kept)):
            masks[choice, list(kept)] = 1
        return masks


def sequences(sites: Sites) -> list[tuple[str, ...]]:
    """The layers in runs that follow each other: entries of one list, told by the last number in their module paths.

    A list of one layer says nothing about depth, so that it is joined with its neighbours: the `transformer_blocks.0`
    of all `attentions` of one stage of an SD 1.5 U-Net are a run. A layer without neighbours is a run of one.

    Args:
        sites: the layers; of one kind, or of kinds that do not contain each other.

    Raises:
        GenpruneError: a layer lies inside another one of them.
    """
    for name in sites:
        if inside := _around(sites, name):
            raise GenpruneError(
                f"'{name}' lies inside '{inside}', and both may go; expected layers that do not contain each other. "
                "Pass kinds=('block',), or ('branch',), ..."
            )
    runs = [(name,) for name in sites]
    deepest = max((len(re.findall(r"\d+", name)) for name in sites), default=0)
    for level in range(1, deepest + 1):
        joined: dict[str, tuple[str, ...]] = {}
        for run in runs:
            # A run that has neighbours already stays as it is.
            key = _without_numbers(run[0], level) if len(run) == 1 else f"run of {run[0]}"
            joined[key] = joined.get(key, ()) + run
        runs = list(joined.values())
    return runs


def _around(sites: Sites, name: str) -> str | None:
    """Another of the sites that contains this one."""
    path = sites[name].path
    return next(
        (other for other, site in sites.items() if other != name and f"{path}.".startswith(f"{site.path}.")), None
    )


def _without_numbers(name: str, count: int) -> str:
    """A site name with the last `count` numbers of its path replaced: `blocks.3:block` -> `blocks.*:block`."""
    path, _, kind = name.rpartition(":")
    parts = path.split(".")
    for index in reversed([i for i, part in enumerate(parts) if part.isdecimal()][-count:]):
        parts[index] = "*"
    return f"{'.'.join(parts)}:{kind}"


def fixed_groups(runs: Iterable[Sequence[str]], kept: int, size: int) -> list[DepthGroup]:
    """`kept` of every `size` consecutive layers; a shorter last group of a run keeps the same share, rounded up."""
    return [DepthGroup(layers, math.ceil(kept * len(layers) / size)) for run in runs for layers in _pieces(run, size)]


def groups_for(
    runs: Iterable[Sequence[str]], size: int, costs: Mapping[str, float], total: float, target: float
) -> list[DepthGroup]:
    """Groups of up to `size` layers that together come as near to a budget as counts of layers can.

    The same share goes from all groups, as evenly as whole layers allow; then single layers more or less, where that
    comes nearer. Layers of one group count at their mean cost, because which of them stay is not known yet.

    Args:
        runs: as `sequences` returns them.
        size: layers of a group at most; a run is split into as few groups as that allows, of nearly equal lengths.
        costs: layer -> what goes with it.
        total: what is there with all layers.
        target: what is to stay.
    """
    pieces = [_even_pieces(run, size) for run in runs]
    groups = [layers for run in pieces for layers in run]
    mean = [sum(costs[name] for name in layers) / len(layers) for layers in groups]

    def miss(removed: Sequence[int]) -> float:
        return abs(total - sum(count * cost for count, cost in zip(removed, mean)) - target)

    ends = {end for run in pieces for end in itertools.accumulate(len(layers) for layers in run)}
    shares = sorted({0.0, 1.0} | {(index + 0.5) / end + 1e-9 for end in ends for index in range(end)})
    removed = min((_spread(pieces, share) for share in shares), key=miss)
    while True:
        trials = [
            [*removed[:index], removed[index] + change, *removed[index + 1 :]]
            for index, layers in enumerate(groups)
            for change in (1, -1)
            if 0 <= removed[index] + change <= len(layers)
        ]
        best = min(trials, key=miss, default=removed)
        if miss(best) >= miss(removed) - 1e-9 * max(total, 1):
            return [DepthGroup(layers, len(layers) - count) for layers, count in zip(groups, removed)]
        removed = best


def _spread(pieces: Sequence[Sequence[Sequence[str]]], share: float) -> list[int]:
    """How many layers go from each group when this share of every run goes, evenly along the run."""
    removed = []
    for run in pieces:
        ends = list(itertools.accumulate((len(layers) for layers in run), initial=0))
        gone = [math.floor(share * end + 0.5) for end in ends]
        removed += [after - before for before, after in itertools.pairwise(gone)]
    return removed


def _pieces(run: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(run[start : start + size]) for start in range(0, len(run), size)]


def _even_pieces(run: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """Ten layers in fours are 4, 3 and 3: a last group of two would be all or nothing more often than the others."""
    count = math.ceil(len(run) / size)
    ends = [math.ceil(len(run) * index / count) for index in range(count + 1)]
    return [tuple(run[start:end]) for start, end in itertools.pairwise(ends)]
