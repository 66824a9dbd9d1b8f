"""Magnitude: how much weight a unit carries beside the other weights of its layers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from genprune.sites import Site, Sites, Slice

_CHUNK = 1 << 20  # entries squared at a time


@dataclass(frozen=True)
class MagnitudeScores:
    """L2 norm of a unit's weights, in units of what its layers have on average: 1 is an average unit of any site.

    For a site that slices layers (heads, neurons, channels, modulation), with `W_s` the tensors that its slices cut
    (weights, and biases of cut rows), `|W_s[u]|` the entries in them that unit u owns, and `rms(W_s)` over all units:

        S_u = sqrt( sum_s ||W_s[u]||^2 / rms(W_s)^2  /  sum_s |W_s[u]| )

    so that neither a layer's scale nor its size matters, and kinds compare. For a site that goes as a whole (branch,
    block, wrapper): the same over every parameter that leaves with it, with the root mean square over the parameters
    in the same role (the same name below the site, over all sites of that kind): a block is measured against other
    blocks' layers of the same name.

    These are ranks rather than losses, so an allocation does not divide them by cost.
    """

    name: ClassVar[str] = "magnitude"
    needs: ClassVar[tuple[str, ...]] = ("weights",)
    additive: ClassVar[bool] = False
    summary: ClassVar[str] = "weight norm relative to the layer; no data"

    def scores(self, model: nn.Module, sites: Sites, calibration=None) -> dict[str, Tensor]:
        """Site name -> scores of shape `(size,)`, float32 on the CPU."""
        sliced = {name: _sliced(model, site) for name, site in sites.items() if site.slices}
        wholes = _wholes(model, [site for site in sites.values() if not site.slices])
        return {name: sliced[name] if name in sliced else wholes[name] for name in sites}


def _sliced(model: nn.Module, site: Site) -> Tensor:
    energies, owned = torch.zeros(site.size), 0
    for piece in site.slices:
        for energy, entries in _unit_energies(model.get_submodule(piece.module), piece, site.size):
            total = energy.sum()
            if total > 0:  # a layer of zeros says nothing
                energies += energy * (entries * site.size / total)
                owned += entries
    return (energies / max(owned, 1)).sqrt()


def _unit_energies(layer: nn.Module, piece: Slice, size: int) -> Iterable[tuple[Tensor, int]]:
    """Squared norm of each unit in each tensor of a layer, shape `(size,)`, and its number of entries per unit."""
    names = ("weight", "bias") if piece.side == "out" else ("weight",)
    for name in names:
        tensor = getattr(layer, name, None)
        if tensor is None:
            continue
        tensor = tensor.detach()
        dim = 1 if piece.side == "in" else 0
        owned = _squares(tensor.narrow(dim, piece.offset, size * piece.width), dim)
        yield owned.reshape(size, piece.width).sum(1).cpu(), tensor.numel() // tensor.shape[dim] * piece.width


def _squares(tensor: Tensor, dim: int | None = None) -> Tensor:
    """Sum of squares over all dimensions but `dim`, in float32, a few rows at a time."""
    rows = max(1, _CHUNK // max(1, tensor[0].numel() if tensor.ndim and len(tensor) else 1))
    sums = []
    for part in tensor.split(rows):
        squares = part.float().square()
        if dim is None:
            sums.append(squares.sum())
        elif squares.ndim == 1:
            sums.append(squares)
        else:
            sums.append(squares.sum([d for d in range(squares.ndim) if d != dim]))
    return torch.cat(sums) if dim == 0 else torch.stack(sums).sum(0)


def _wholes(model: nn.Module, sites: list[Site]) -> dict[str, Tensor]:
    parts: dict[str, list[tuple[tuple, float, int]]] = {}  # site -> (role, sum of squares, entries) of each tensor
    roles: dict[tuple, tuple[float, int]] = {}  # role -> the same sums over all sites
    known: dict[int, float] = {}
    for site in sites:
        parts[site.name] = []
        for change in site.emptied:
            removed = model.get_submodule(change.module)
            left = {id(p) for p in change.build(removed).parameters()}
            for name, parameter in removed.named_parameters():
                if id(parameter) in left:
                    continue
                if id(parameter) not in known:  # sites nest: a block's parameters are also a wrapper's
                    known[id(parameter)] = float(_squares(parameter.detach()))
                role = site.kind, re.sub(r"\d+", "*", change.module.rsplit(".", 1)[-1]), name
                squares, entries = known[id(parameter)], parameter.numel()
                parts[site.name].append((role, squares, entries))
                before = roles.get(role, (0.0, 0))
                roles[role] = before[0] + squares, before[1] + entries
    scores = {}
    for name, tensors in parts.items():
        live = [(squares * roles[role][1] / roles[role][0], n) for role, squares, n in tensors if roles[role][0] > 0]
        energy, entries = sum(e for e, _ in live), sum(n for _, n in live)
        scores[name] = torch.tensor([energy / max(entries, 1)]).sqrt()
    return scores
