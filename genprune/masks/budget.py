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
    logits: Mapping[str, Tensor],
    relaxation: HardConcrete,
    sites: Sites,
    shares: Mapping[str, float],
    whole: float,
    sharpness: float = 1.0,
) -> Tensor:
    """The share of the dense model that stays, where a unit stays if its gate is above one half. A scalar.

        whole - sum_u share_u (P(u stays or something that contains it goes) ...)

    A unit inside a branch or block counts for what is left of that: its share times the probability that all that
    contains it stays. Exact for disjoint units, an upper bound on what a site with an emptied layer keeps.

    Args:
        shares: of `unit_shares`.
        whole: share of the dense model that is there before any mask; 1 for a dense model.
        sharpness: 1: the exact probability, flat for logits that the noise cannot turn over. 0: its limit for undamped
            noise, which answers every move of a logit. Between: a blend.
    """

    def probability(values: Tensor) -> Tensor:
        smooth, exact = relaxation.smooth_probability(values, 0.5), relaxation.probability(values, 0.5)
        return (1 - sharpness) * smooth + sharpness * exact

    stays = {name: probability(values) for name, values in logits.items()}
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


_STEEPEST = 3.0  # largest |log| of what the present miss multiplies the price by
_FASTEST = 0.3  # largest change of log(base) in one step
_HIGHEST = 1e15  # where no logit follows it stops here: the optimiser squares gradients in float32


@dataclass
class BudgetController:
    """A Lagrange multiplier (the price of the whole model's cost) that follows a falling target.

        price = base * exp(stiffness * miss),    base <- base * exp(rate * miss),    miss = share - target

    A price sets how fast logits fall, so the share is its integral: the first factor, which answers at once, keeps the
    loop from swinging, and the second finds the scale. The target goes linearly from the share at the start to `keep`
    over the first `anneal` of the steps. Meanwhile the share is measured with growing `sharpness`, because the exact
    one answers only after logits have come a long way.

    Args:
        keep: share of the dense denoiser that is to stay.
        start: expected share before the first step, at sharpness 0.
        steps: optimiser steps of the run.
        anneal: share of them over which the target falls.
        stiffness, rate: per unit of share missed.

    Attributes:
        base: None until the first gradient is seen.
        miss: expected share minus target, after the last step.
    """

    keep: float
    start: float
    steps: int
    anneal: float = 0.6
    stiffness: float = 40.0
    rate: float = 1.5
    base: float | None = None
    miss: float = 0.0

    @property
    def price(self) -> float:
        """The multiplier in force."""
        factor = math.exp(max(-_STEEPEST, min(_STEEPEST, self.stiffness * self.miss)))
        return min(_HIGHEST, max(1 / _HIGHEST, self.base * factor))

    def progress(self, step: int) -> float:
        """How far the target has fallen after optimiser step `step` (from 0), in [0, 1]; also the sharpness then."""
        return min(1.0, (step + 1) / max(1.0, self.anneal * self.steps))

    def target(self, step: int) -> float:
        """The share that is to stay after optimiser step `step`."""
        return self.start + (self.keep - self.start) * self.progress(step)

    def begin(self, loss_gradients: list[Tensor], penalty_gradients: list[Tensor]) -> None:
        """Set the first price to where loss and weighted penalty balance on the median unit; one tensor a site."""
        loss = torch.cat([gradient.abs().flatten() for gradient in loss_gradients])
        penalty = torch.cat([gradient.abs().flatten() for gradient in penalty_gradients])
        usable = (penalty > 0) & (loss > 0)
        self.base = float((loss[usable] / penalty[usable]).median()) if usable.any() else 1.0

    def update(self, step: int, share: float) -> None:
        """Take note of the expected share after optimiser step `step`, and move the price."""
        self.miss = share - self.target(step)
        moved = self.base * math.exp(max(-_FASTEST, min(_FASTEST, self.rate * self.miss)))
        self.base = min(_HIGHEST, max(1 / _HIGHEST, moved))
