"""Magnitude: how much weight a unit carries beside the other weights of its layers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from genprune.sites import Site, Sites, Slice


@dataclass(frozen=True)
class MagnitudeScores:
    """Squared L2 norm of a unit's weights, each layer scaled to a mean square of 1 first.

    For a site that slices layers (heads, neurons, channels, modulation), with `W_s` the layer of slice `s` as the
    slice cuts it (all rows or columns that the site owns there, and for rows the bias too):

        S_u = sum over slices s of ||W_s[u]||^2 / mean(W_s^2)

    so that a unit of average weights scores its number of parameters, whatever the layer's scale, and scores add up.
    Squared, because the global allocation divides by cost: two units that weigh as much as one must score as much.

    For a site that goes as a whole (branch, block, wrapper): the same sum over every parameter that leaves with it,
    divided by the mean square of the parameters in the same role (the same name below the site, over all sites of
    that kind): a block is measured against other blocks' layers of the same name.
    """

    name: ClassVar[str] = "magnitude"
    needs: ClassVar[tuple[str, ...]] = ("weights",)
    additive: ClassVar[bool] = True
    summary: ClassVar[str] = "squared weight norm, relative to the layer; no data"

    def scores(self, model: nn.Module, sites: Sites, calibration=None) -> dict[str, Tensor]:
        """Site name -> scores of shape `(size,)`, float32 on the CPU."""
        sliced = {name: _sliced(model, site) for name, site in sites.items() if site.slices}
        wholes = _wholes(model, [site for site in sites.values() if not site.slices])
        return {name: sliced[name] if name in sliced else wholes[name] for name in sites}


def _sliced(model: nn.Module, site: Site) -> Tensor:
    score = torch.zeros(site.size)
    for piece in site.slices:
        for energy, entries in _unit_energies(model.get_submodule(piece.module), piece, site.size):
            total = energy.sum()
            if total > 0:  # a layer of zeros says nothing
                score += energy * (entries * site.size / total)
    return score


def _unit_energies(layer: nn.Module, piece: Slice, size: int) -> Iterable[tuple[Tensor, int]]:
    """Squared norm of each unit in each tensor of a layer, shape `(size,)`, and its number of entries per unit."""
    names = ("weight", "bias") if piece.side == "out" else ("weight",)
    for name in names:
        tensor = getattr(layer, name, None)
        if tensor is None:
            continue
        tensor = tensor.detach().float()
        if piece.side == "in":
            tensor = tensor.transpose(0, 1)
        squares = tensor.square().flatten(1).sum(1) if tensor.ndim > 1 else tensor.square()  # (rows or columns,)
        owned = squares[piece.offset : piece.offset + size * piece.width]
        yield owned.reshape(size, piece.width).sum(1).cpu(), tensor[0].numel() * piece.width


def _wholes(model: nn.Module, sites: list[Site]) -> dict[str, Tensor]:
    energy: dict[str, list[tuple[tuple, float]]] = {}
    roles: dict[tuple, list[float]] = {}  # role -> [sum of squares, entries]
    for site in sites:
        energy[site.name] = []
        for change in site.emptied:
            removed = model.get_submodule(change.module)
            left = {id(p) for p in change.build(removed).parameters()}
            for name, parameter in removed.named_parameters():
                if id(parameter) in left:
                    continue
                role = site.kind, re.sub(r"\d+", "*", change.module.rsplit(".", 1)[-1]), name
                squares = float(parameter.detach().float().square().sum())
                energy[site.name].append((role, squares))
                sums = roles.setdefault(role, [0.0, 0])
                sums[0], sums[1] = sums[0] + squares, sums[1] + parameter.numel()
    return {
        name: torch.tensor([sum(squares * roles[r][1] / roles[r][0] for r, squares in parts if roles[r][0] > 0)])
        for name, parts in energy.items()
    }
