"""From the menu to candidates: operators fitted, units chosen, costs counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from genprune.costs import SiteCosts
from genprune.criteria import criterion_named
from genprune.denoising.replay import ModelCall
from genprune.families import OperatingPoint
from genprune.layers.candidates import Candidate
from genprune.layers.fitting import fitted
from genprune.layers.menu import Offer
from genprune.layers.operator_costs import OperatorCosts
from genprune.operations import operation_tensors, replace_op
from genprune.sites import Sites


def operator_candidates(
    model: nn.Module,
    sites: Sites,
    costs: SiteCosts,
    offered: Iterable[Offer],
    calls: Sequence[ModelCall],
    point: OperatingPoint,
    progress: bool = False,
) -> list[Candidate]:
    """A candidate for each offer that saves something: parameters, or MACs, and more of neither.

    Args:
        model: in evaluation mode; not changed.
        sites, costs: of the model.
        offered: from `menu.offers`.
        calls: what operators are fitted on.
        point: where MACs are counted.
    """
    offered = list(offered)
    requests = {(offer.name, path): (path, *spec) for offer in offered for path, spec in offer.operators.items()}
    counted = OperatorCosts(model, point, {path for path, *_ in requests.values()})
    saves = {offer.name: _saves(offer, costs, counted) for offer in offered if offer.operators}
    useful = {name for name, saved in saves.items() if min(saved.values()) >= 0}
    operators = fitted(
        model, {key: spec for key, spec in requests.items() if key[0] in useful}, calls, progress=progress
    )
    magnitudes = _unit_scores(model, sites, [offer.site for offer in offered if offer.site])
    found = []
    for offer in offered:
        if offer.site is not None:
            found.append(_narrower(offer, costs, magnitudes[offer.site]))
        elif offer.name in useful:
            ops, tensors = [], {}
            for path, (name, settings) in offer.operators.items():
                ops.append(replace_op(path, name, settings))
                tensors |= operation_tensors(path, operators[offer.name, path])
            found.append(Candidate(offer.name, offer.paths, saves[offer.name], ops=tuple(ops), tensors=tensors))
    return found


def _saves(offer: Offer, costs: SiteCosts, counted: OperatorCosts) -> dict[str, float]:
    saved = {"params": 0, "macs": 0}
    for path, (name, settings) in offer.operators.items():
        before, after = costs.total.within(path), counted.of(path, name, settings)
        saved["params"] += before.params - after.params
        saved["macs"] += before.macs - after.macs
    return saved


def _unit_scores(model: nn.Module, sites: Sites, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Magnitudes of the units of these sites: which of them stay where only a share does."""
    if not names:
        return {}
    return criterion_named("magnitude")().scores(model, sites.match(*names), None)


def _narrower(offer: Offer, costs: SiteCosts, scores: torch.Tensor) -> Candidate:
    count = max(1, round(offer.share * scores.numel()))
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.topk(count).indices] = True
    left = costs.predict({offer.site: mask})
    saves = {"params": costs.total.params - left.params, "macs": costs.total.macs - left.macs}
    return Candidate(offer.name, offer.paths, saves, keep={offer.site: mask})
