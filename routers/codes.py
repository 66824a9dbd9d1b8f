"""From learned codes to plans: one threshold, moved until the routed prompts keep the budget on average."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from genprune.costs import SiteCosts
from genprune.plan import PlanBase, PruningPlan
from genprune.routers.architecture import ArchitectureSpace
from genprune.sites import effective_keep

logger = logging.getLogger(__name__)
_WIDEST, _ROUNDS = 40.0, 60  # of the search: logits beyond this are all on one side
TOLERANCE = 0.005  # of the dense model


def shares_of(space: ArchitectureSpace, codes: Tensor, costs: SiteCosts, of: str, shift: float = 0.0) -> list[float]:
    """What each code leaves, as a share of the dense model: exact, of the really cut model."""
    total = getattr(costs.total, of)
    return [getattr(costs.predict(space.keep(code, shift)), of) / total for code in codes]


def budget_shift(
    space: ArchitectureSpace, codes: Tensor, usage: Sequence[float], costs: SiteCosts, keep: float, of: str
) -> float:
    """What to add to the logits of all codes so that the mean over routed prompts is the budget.

    Routes do not depend on it, and shares rise with it, so that a bisection finds the nearest step.

    Args:
        codes: logits `(K, D)`.
        usage: share of the prompts that goes to each code.
        keep: share of the dense model that stays on average.

    Returns:
        The shift; its miss is logged where it is above 0.5 % of the dense model.
    """

    def mean(shift: float) -> float:
        return sum(part * share for part, share in zip(usage, shares_of(space, codes, costs, of, shift)))

    low, high = -_WIDEST, _WIDEST  # mean(low) <= keep <= mean(high), as far as both are possible
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < keep else (low, middle)
    best = min((low, high), key=lambda shift: abs(mean(shift) - keep))
    if abs(mean(best) - keep) > TOLERANCE:
        logger.warning("codes keep %.4f of %s on average, %.4f was asked for: steps are coarse", mean(best), of, keep)
    return best


def code_plans(
    space: ArchitectureSpace,
    codes: Tensor,
    costs: SiteCosts,
    base: PlanBase,
    shift: float,
    made_by: Mapping[str, Any],
    budget: Mapping[str, Any],
    shares: Sequence[float],
) -> list[PruningPlan]:
    """One plan a code, with params and MACs of dense and cut.

    Args:
        shares: of `shares_of`, in the budget's quantity.
        made_by: what is noted in every plan.
        budget: `keep` and `of` of the average; `reached` is each plan's own.
    """
    plans = []
    for index, (code, share) in enumerate(zip(codes, shares)):
        keep = space.keep(code, shift)
        left = costs.predict(keep)
        figures = {"dense_params": costs.total.params, "params": left.params}
        figures |= {"dense_macs": costs.total.macs, "macs": left.macs}
        plans.append(
            PruningPlan(
                base=base,
                keep=effective_keep(costs.sites, {name: mask.cpu() for name, mask in keep.items()}),
                operating_point=asdict(costs.total.operating_point),
                figures=figures,
                made_by={**made_by, "expert": index, "budget": {**budget, "reached": share}},
            )
        )
    return plans


def usage_of(chosen: Sequence[int] | Tensor, experts: int) -> list[float]:
    """Share of the prompts that goes to each expert."""
    counts = torch.bincount(torch.as_tensor(chosen), minlength=experts)
    return (counts / max(1, int(counts.sum()))).tolist()
