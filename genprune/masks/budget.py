"""The price of a unit's cost: raised and lowered until the expected cost of the masks follows the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from genprune.costs import SiteCosts
from genprune.masks.hard_concrete import HardConcrete
from genprune.sites import Sites


def unit_shares(sites: Sites, costs: SiteCosts, dense_total: int, of: str) -> dict[str, float]:
    """Site name -> what one unit costs, as a share of the dense model in the budget's quantity.

    Args:
        dense_total: of the dense denoiser; its number of units for `of="units"`.
    """
    if of == "units":
        return {name: 1 / dense_total for name in sites}
    return {name: getattr(costs.unit(name), of) / dense_total for name in sites}


def expected_share(
    logits: Mapping[str, Tensor], relaxation: HardConcrete, sites: Sites, shares: Mapping[str, float], whole: float
) -> Tensor:
    """The share of the dense model that stays, where a unit stays if its gate is above one half. A scalar.

        whole - sum_u share_u (P(u stays or something that contains it goes) ...)

    A unit inside a branch or block counts for what is left of that: its share times the probability that all that
    contains it stays. Exact for disjoint units, an upper bound on what a site with an emptied layer keeps.

    Args:
        shares: of `unit_shares`.
        whole: share of the dense model that is there before any mask; 1 for a dense model.
    """
    stays = {name: relaxation.probability(values, level=0.5) for name, values in logits.items()}
    inside: dict[str, list[str]] = {name: [] for name in logits}
    for name in logits:
        above = next((parent for parent in sites.ancestors(name) if parent in logits), None)
        if above is not None:
            inside[above].append(name)

    def removed(name: str) -> Tensor:
        """Share that goes with this site's units and with everything masked inside it."""
        own = (1 - stays[name]).sum() * shares[name]
        if not inside[name]:
            return own
        # the site has one unit: what is inside goes only where the site stays, and is part of the site's own cost
        return own + stays[name].sum() * sum(removed(child) for child in inside[name])

    roots = [name for name in logits if not any(parent in logits for parent in sites.ancestors(name))]
    return whole - sum(removed(name) for name in roots)


_FASTEST = 0.2  # largest change of log(price) in one step
_HIGHEST = 1e15  # where no logit follows it stops here: the optimiser squares gradients in float32


@dataclass
class BudgetController:
    """A Lagrange multiplier (the price of the whole model's cost) that follows a falling target.

    The target goes linearly from `whole` to `keep` over the first `anneal` of the steps. Each step multiplies
    the price by `exp(gain * miss + damping * change of the miss)`, so that it needs no scale: it starts where the
    gradient of the penalty equals that of the loss on the median unit.

    Args:
        keep: share of the dense denoiser that is to stay.
        whole: share that is there before any mask.
        steps: optimiser steps of the run.
        anneal: share of them over which the target falls.
        gain, damping: per unit of share missed.

    Attributes:
        price: current multiplier; None until the first gradient is seen.
        miss: expected share minus target, after the last step.
    """

    keep: float
    whole: float
    steps: int
    anneal: float = 0.7
    gain: float = 4.0
    damping: float = 40.0
    price: float | None = None
    miss: float = 0.0

    def target(self, step: int) -> float:
        """The share that is to stay after optimiser step `step` (from 0)."""
        progress = min(1.0, (step + 1) / max(1.0, self.anneal * self.steps))
        return self.whole + (self.keep - self.whole) * progress

    def start(self, loss_gradients: list[Tensor], penalty_gradients: list[Tensor]) -> None:
        """Set the first price from the gradients of the loss and of the weighted penalty, one tensor a site."""
        loss = torch.cat([gradient.abs().flatten() for gradient in loss_gradients])
        penalty = torch.cat([gradient.abs().flatten() for gradient in penalty_gradients])
        usable = (penalty > 0) & (loss > 0)
        if not usable.any():
            self.price = 1.0
            return
        self.price = float((loss[usable] / penalty[usable]).median())

    def update(self, step: int, share: float) -> None:
        """Take note of the expected share after optimiser step `step`, and move the price."""
        miss = share - self.target(step)
        move = self.gain * miss + self.damping * (miss - self.miss)
        # Logits need some steps to answer a price; a faster rise would overshoot before they do.
        price = self.price * math.exp(max(-_FASTEST, min(_FASTEST, move)))
        self.price = min(_HIGHEST, max(1 / _HIGHEST, price))
        self.miss = miss
