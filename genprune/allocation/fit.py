"""Walk a removal order until the budget is met, to within half a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from genprune.allocation.orders import ALLOCATIONS
from genprune.allocation.reachable import refuse
from genprune.allocation.request import Request, check_budget, check_kinds, eligible
from genprune.allocation.steps import Steps, make_steps, masks_of
from genprune.costs import Costs, SiteCosts
from genprune.errors import GenpruneError, nearest
from genprune.sites import Sites

TOLERANCE = 0.005  # of the dense model: the miss that is never an error


@dataclass(frozen=True)
class Fitted:
    """What an allocation found.

    Attributes:
        keep: site name -> kept units, for every eligible site.
        costs: of the model cut by it.
        reached: share of the dense model that stays, in the budget's quantity.
    """

    keep: dict[str, Tensor]
    costs: Costs
    reached: float


def fit(
    scores: Mapping[str, Tensor], costs: SiteCosts, dense: Costs, request: Request, additive: bool = True
) -> Fitted:
    """The units that stay under a budget.

    Args:
        scores: site name -> shape `(size,)`, higher = keep, for every site of the requested kinds.
        costs: of the model as it is.
        dense: of the dense model, which `keep` counts against.
        additive: whether scores add up over units.

    Returns:
        `Fitted`; its miss is at most the larger of 0.5 % of the dense model and half the smallest legal step.
        Within a run of steps each below 1 % of the dense model, the units kept at a smaller `keep` are a subset of
        those kept at a larger one.

    Raises:
        BudgetUnreachable: no legal plan is that small, or the model is smaller already.
        NoMatchingSites: kinds or patterns match nothing. GenpruneError: `keep`, `of` or `allocation` is out of range.
    """
    check_budget(request.keep, request.of)
    check_kinds(request.kinds)
    if request.allocation not in ALLOCATIONS:
        raise GenpruneError(
            f"allocation='{request.allocation}'{nearest(request.allocation, ALLOCATIONS)}; expected one of "
            f"{', '.join(ALLOCATIONS)}."
        )
    sites = eligible(costs.sites, request)
    order = ALLOCATIONS[request.allocation]
    if request.of == "units":
        groups = [sites.of_kind(kind) for kind in sites.kinds()]
    else:
        groups = [sites]
    keep: dict[str, Tensor] = {}
    for group in groups:
        steps = make_steps(group, scores, costs, request)
        walk = _Walk(group, costs, dense, steps, order(steps, additive), request)
        keep |= {name: torch.ones(site.size, dtype=torch.bool) for name, site in group.items()}
        keep |= masks_of(steps.columns, walk.to_budget(), scores)
    left = costs.predict(keep)
    if request.of == "units":
        reached = sum(int(mask.sum()) for mask in keep.values()) / sum(mask.numel() for mask in keep.values())
    else:
        reached = getattr(left, request.of) / getattr(dense, request.of)
    return Fitted(keep, left, reached)


class _Walk:
    """One order of steps, and the costs along it."""

    def __init__(
        self, sites: Sites, costs: SiteCosts, dense: Costs, steps: Steps, key: Tensor, request: Request
    ) -> None:
        self.sites, self.costs, self.steps, self.request = sites, costs, steps, request
        self.order = torch.sort(key, stable=True).indices
        self.columns = steps.column[self.order]
        if request.of == "units":
            self.dense = sum(site.size for site in sites.values())
        else:
            self.dense = getattr(dense, request.of)
        self.target = request.keep * self.dense
        smallest = float(steps.cost.min()) if len(steps.cost) else 0.0
        self.tolerance = max(TOLERANCE * self.dense, smallest / 2)

    def taken(self, count: int) -> list[int]:
        """Steps of each column among the first `count` of the order."""
        return torch.bincount(self.columns[:count], minlength=len(self.steps.columns)).tolist()

    def cost(self, taken: list[int]) -> int:
        """What is left after these steps, in the budget's quantity."""
        columns = self.steps.columns
        widths = {name: column.widths[n] for column, n in zip(columns, taken) for name in column.sites}
        if self.request.of == "units":
            return self.dense - sum(self.sites[name].size - width for name, width in widths.items())
        return getattr(self.costs.predict_widths(widths), self.request.of)

    def to_budget(self) -> list[int]:
        """Steps of each column that meet the budget. Raises `BudgetUnreachable`."""
        low, high = 0, len(self.order)  # cost(low) >= target >= cost(high), as far as both are possible
        whole, least = self.cost(self.taken(low)), self.cost(self.taken(high))
        if whole < self.target - self.tolerance or least > self.target + self.tolerance:
            raise refuse(self.costs, self.dense, self.request, whole, least)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.cost(self.taken(middle)) >= self.target else (low, middle)
        best = min((self.taken(low), self.taken(high)), key=lambda taken: abs(self.cost(taken) - self.target))
        if not self._met(best):
            best = self._filled(low)
        if not self._met(best):
            best = self._swapped(best)
        if not self._met(best):
            raise refuse(self.costs, self.dense, self.request, whole, least, closest=self.cost(best))
        return best

    def _met(self, taken: list[int]) -> bool:
        return abs(self.cost(taken) - self.target) <= self.tolerance

    def _filled(self, count: int) -> list[int]:
        """The first `count` steps, and later ones that still fit: for a step too large to end on."""
        taken, left = self.taken(count), self.cost(self.taken(count))
        for index in self.order[count:].tolist():
            gap = left - self.target
            if gap <= self.tolerance:
                break
            column = int(self.steps.column[index])
            site = self.steps.columns[column]
            # The step's cost is exact for a site that holds no other; else an upper bound, and so worth a look.
            if self.steps.cost[index] > gap + self.tolerance and site.size > 1:
                continue
            taken[column] += 1
            after = self.cost(taken)
            if after < self.target - self.tolerance:
                taken[column] -= 1
            else:
                left = after
        return taken

    def _swapped(self, taken: list[int]) -> list[int]:
        """The best of all single additions, removals and exchanges of one step: for few and coarse steps."""
        columns = self.steps.columns
        more = [c for c, column in enumerate(columns) if taken[c] + 1 < len(column.widths)]
        fewer = [c for c in range(len(columns)) if taken[c] > 0]
        if len(more) * len(fewer) > 20_000:
            return taken
        best = taken
        for add in [None, *more]:
            for drop in [None, *fewer]:
                trial = list(taken)
                if add is not None:
                    trial[add] += 1
                if drop is not None:
                    trial[drop] -= 1
                if abs(self.cost(trial) - self.target) < abs(self.cost(best) - self.target):
                    best = trial
        return best
