"""Legal steps: what can go together, in columns of sites that shrink alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from genprune.allocation.request import Request
from genprune.allocation.width_classes import width_classes
from genprune.costs import SiteCosts
from genprune.sites import Site, Sites


@dataclass(frozen=True)
class Column:
    """Sites that always have the same width, and the widths that they may take.

    Args:
        sites: names; one, unless width classes join several.
        kind, size: of these sites.
        widths: legal widths, descending from `size`.
        scores: sorted ascending and summed over the sites, shape `(size,)`: what the u-th removal costs in score.
    """

    sites: tuple[str, ...]
    kind: str
    size: int
    widths: tuple[int, ...]
    scores: Tensor = field(repr=False)


@dataclass(frozen=True)
class Steps:
    """All steps of all columns. A step takes its column from one legal width to the next smaller one.

    Every tensor has one entry per step: `column` (index), `units` (units that go), `score` (their sum), `cost`
    (in the budget's quantity), `share` (of its site that is gone in the middle of the step).
    """

    columns: tuple[Column, ...]
    column: Tensor
    units: Tensor
    score: Tensor
    cost: Tensor
    share: Tensor


def legal_widths(site: Site, request: Request) -> tuple[int, ...]:
    """Widths that a site may have, descending from its size. A site of one unit may go; others keep a floor."""
    if site.size == 1:
        return 1, 0
    floor = max(1, math.ceil(request.min_keep * site.size - 1e-9))
    grain = request.round_to if site.kind == "neurons" else 1
    first = (site.size - 1) // grain * grain
    return site.size, *range(first, floor - 1, -grain)


def make_steps(sites: Sites, scores: Mapping[str, Tensor], costs: SiteCosts, request: Request) -> Steps:
    """The steps that a request allows.

    Args:
        sites: the eligible ones.
        scores: site name -> shape `(size,)`, higher = keep.
    """
    columns, parts = [], []
    for names in width_classes(sites, scores, costs, request.max_width_classes):
        site = sites[names[0]]
        widths = legal_widths(site, request)
        if len(widths) < 2:
            continue
        ascending = torch.stack([scores[name].double().sort().values for name in names]).sum(0)  # (size,)
        unit = sum(_quantity(costs.unit(name), request.of) for name in names)
        kept = torch.tensor(widths, dtype=torch.double)
        removed = site.size - kept  # (steps + 1,)
        total = torch.cat([ascending.new_zeros(1), ascending.cumsum(0)])[removed.long()]  # (steps + 1,)
        units = removed.diff()
        parts.append(
            (
                torch.full(units.shape, len(columns)),
                units * len(names),
                total.diff(),
                units * unit,
                (removed[1:] + removed[:-1]) / (2 * site.size),
            )
        )
        columns.append(Column(tuple(names), site.kind, site.size, widths, ascending))
    joined = [torch.cat(values) for values in zip(*parts)] if parts else [torch.zeros(0)] * 5
    return Steps(tuple(columns), joined[0].long(), *joined[1:])


def _quantity(unit, of: str) -> int:
    return 1 if of == "units" else getattr(unit, of)


def masks_of(columns: tuple[Column, ...], taken: list[int], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Site name -> kept units after `taken[c]` steps of each column; the lowest scores go, ties by unit index."""
    masks = {}
    for column, steps in zip(columns, taken):
        for name in column.sites:
            mask = torch.ones(column.size, dtype=torch.bool)
            lowest = torch.sort(scores[name], stable=True).indices[: column.size - column.widths[steps]]
            mask[lowest] = False
            masks[name] = mask
    return masks
