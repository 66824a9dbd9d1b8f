"""Global allocation: one ranking over all sites, score per cost."""

from __future__ import annotations

from torch import Tensor

from genprune.allocation.steps import Steps


def global_order(steps: Steps, additive: bool) -> Tensor:
    """Sort key of each step, ascending = goes first: score per cost, or the mean score where scores are ranks.

    A whole branch or block is ranked by its own score over everything that leaves with it.
    """
    return steps.score / (steps.cost.clamp(min=1) if additive else steps.units)
