"""What a code costs: exact params or MACs of the model that it leaves, with gradients by its gates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from genprune.costs import SiteCosts
from genprune.errors import GenpruneError
from genprune.routers.architecture import ArchitectureSpace

QUANTITIES = ("macs", "params")


@dataclass(frozen=True)
class CodeCosts:
    """The cost of gated models as a share of the dense one.

    Layers that two sites narrow cost the product of what both leave; what is inside a part that goes counts nothing:
    the same arithmetic as `SiteCosts.predict_widths`, over tensors, without its rounding to whole numbers.

    Args:
        costs: of the dense model's sites, at the operating point of the budget.
        space: whose sites are gated.
        of: `macs` or `params`.
    """

    costs: SiteCosts = field(repr=False)
    space: ArchitectureSpace = field(repr=False)
    of: str = "macs"

    def __post_init__(self) -> None:
        if self.of not in QUANTITIES:
            raise GenpruneError(f"of={self.of!r}; expected one of {', '.join(QUANTITIES)} for a router's budget.")

    @cached_property
    def total(self) -> int:
        return getattr(self.costs.total, self.of)

    @cached_property
    def least(self) -> float:
        """Share that no code can go below: one unit at every site, the first depth gate alone."""
        widths = {vector.site: 1 for vector in self.space.widths} | {name: 0 for name in self.space.depth[1:]}
        return getattr(self.costs.predict_widths(widths), self.of) / self.total

    def share(self, gates: Mapping[str, Tensor]) -> Tensor:
        """Share of the dense model that stays, shape `(rows,)`, of gates `(rows, size)` by site name."""
        rows = next(iter(gates.values()))
        removed = rows.new_zeros(rows.shape[0])
        entries: dict[str, dict[str, Tensor]] = {}  # layer -> side -> rows or columns that go
        stays: dict[str, Tensor] = {}  # layer -> whether what contains it stays
        for vector in self.space.widths:
            site = self.costs.sites[vector.site]
            gone, inside = (1 - gates[vector.site]).sum(-1), self._inside(vector.above, gates)
            for piece in site.slices:
                sides = entries.setdefault(piece.module, {})
                sides[piece.side] = sides.get(piece.side, 0) + gone * piece.width
                stays[piece.module] = inside
            if site.attention is not None and self.of == "macs":
                matmuls = self.costs.total.modules[site.attention].macs
                removed = removed + inside * gone * (matmuls / site.size)
        for path, sides in entries.items():
            removed = removed + stays[path] * self._layer(path, sides)
        for index, name in enumerate(self.space.depth):
            around = self._inside(self._depth_above[index], gates)
            removed = removed + around * (1 - gates[name][:, 0]) * self._leaving[name]
        return 1 - removed / self.total

    def _inside(self, above: tuple[int, ...], gates: Mapping[str, Tensor]) -> Tensor:
        stays = next(iter(gates.values()))[:, 0] * 0 + 1
        for index in above:
            stays = stays * gates[self.space.depth[index]][:, 0]
        return stays

    def _layer(self, path: str, sides: Mapping[str, Tensor]) -> Tensor:
        """What goes from one layer."""
        layer = self.costs.layers[path]
        rows = 1 - sides.get("out", torch.zeros(())) / layer.rows
        columns = 1 - sides.get("in", torch.zeros(())) / layer.columns if layer.columns else 1
        if self.of == "macs":
            return layer.macs * (1 - rows * columns)
        return layer.weight * (1 - rows * columns) + layer.bias * (1 - rows)

    @cached_property
    def _leaving(self) -> dict[str, int]:
        """What goes with each depth gate, everything in it included."""
        return {name: self.total - getattr(self.costs.predict_widths({name: 0}), self.of) for name in self.space.depth}

    @cached_property
    def _depth_above(self) -> list[tuple[int, ...]]:
        depth = self.space.depth
        return [
            tuple(depth.index(parent) for parent in self.costs.sites.ancestors(name) if parent in depth)
            for name in depth
        ]

    def prunable_target(self, keep: float) -> float:
        """The share of what can go that has to stay, so that `keep` of the whole does: APTP's p'.

        Raises:
            GenpruneError: no code leaves so little.
        """
        target = (keep - self.least) / (1 - self.least)
        if target <= 0:
            raise GenpruneError(
                f"keep={keep} of {self.of}, and no code of this space leaves less than {self.least:.3f}; expected "
                "more than that. Raise keep, add kinds of sites, or allow depth."
            )
        return target
