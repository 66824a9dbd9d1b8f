"""The 0/1 knapsack with several budgets, exclusions and groups, solved exactly by HiGHS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from genprune.errors import BudgetUnreachable

TIME_LIMIT = 120  # seconds; far beyond what the largest U-Net needs


@dataclass(frozen=True)
class Limit:
    """How many of some choices may be taken: `low <= count <= high`.

    Args:
        members: indices of choices.
        low, high: bounds of their number.
        reason: what a user is told when this is what makes a budget unreachable; limits are named by it.
    """

    members: tuple[int, ...]
    low: int
    high: int
    reason: str


@dataclass(frozen=True)
class Demand:
    """How much of one quantity has to go: `low <= saved <= high`, in shares of the dense model."""

    saves: tuple[float, ...]
    low: float
    high: float = float("inf")


@dataclass(frozen=True)
class Knapsack:
    """Which choices to take so that they save enough and lose least:

        min  sum_i L_i x_i     s.t.   low_q <= sum_i p_qi x_i <= high_q   for every quantity q,   x_i in {0, 1}

    Args:
        losses: of each choice.
        demands: quantity -> what each choice saves of it and how much has to go.
        limits: exclusions and groups.

    Reference:
        LAPTOP-Diff (arXiv 2404.11098): removed layers as a knapsack over one-shot losses. The form with several
        budgets and exclusions is a mixed-integer linear program.
    """

    losses: tuple[float, ...]
    demands: Mapping[str, Demand]
    limits: tuple[Limit, ...] = ()

    def solve(self) -> list[int]:
        """Indices of the choices to take, ascending.

        Raises:
            BudgetUnreachable: none meets every demand; the message names what binds.
        """
        taken = _solved(np.asarray(self.losses, dtype=float), self.demands, self.limits)
        if taken is None:
            raise BudgetUnreachable(self._binding())
        return taken

    def most(self, quantity: str) -> float:
        """The largest saving of one quantity that the limits allow, whatever it loses."""
        saves = np.asarray(self.demands[quantity].saves, dtype=float)
        taken = _solved(-saves, {}, self.limits)
        return float(saves[taken].sum()) if taken else 0.0

    def _binding(self) -> str:
        """Which demand or limit cannot be met, found by leaving out one after the other."""
        for name, demand in self.demands.items():
            most = self.most(name)
            if most < demand.low:
                without = self._freed_by(name)
                advice = f"; without {without} it could" if without else ""
                return (
                    f"the budget on {name} asks for {demand.low:.1%} of the dense model to go, and everything that "
                    f"may go is {most:.1%}{advice}. Pass a keep of at least {1 - most:.3f}, protect less, or allow "
                    "more kinds."
                )
        if _solved(np.zeros(len(self.losses)), self.demands, ()) is None:
            names = [name for name in self.demands if self._feasible_without(demand=name)]
            if len(self.demands) > 1:
                return (
                    f"the budgets on {', '.join(self.demands)} can each be met, but not together"
                    f"{f'; without the one on {names[0]} the others can' if names else ''}. Loosen one of them."
                )
            name, demand = next(iter(self.demands.items()))
            return (
                f"no set of choices saves between {demand.low:.1%} and {demand.high:.1%} of {name}: the steps are "
                "coarser than that. Pass another keep, or add finer kinds."
            )
        reasons = list(dict.fromkeys(limit.reason for limit in self.limits))
        binding = [reason for reason in reasons if self._feasible_without(reason=reason)]
        return (
            f"the budgets can be met without, but not with, {' and '.join(binding or reasons)}. Loosen that, or pass "
            "another keep."
        )

    def _freed_by(self, quantity: str) -> str:
        """The limit without which the demand could be met, in words; empty where none alone is to blame."""
        demand = self.demands[quantity]
        for reason in dict.fromkeys(limit.reason for limit in self.limits):
            left = tuple(limit for limit in self.limits if limit.reason != reason)
            if replace(self, limits=left).most(quantity) >= demand.low:
                return reason
        return ""

    def _feasible_without(self, demand: str | None = None, reason: str | None = None) -> bool:
        demands = {name: each for name, each in self.demands.items() if name != demand}
        limits = tuple(limit for limit in self.limits if limit.reason != reason) if reason else ()
        return _solved(np.zeros(len(self.losses)), demands, limits) is not None


def _solved(objective: np.ndarray, demands: Mapping[str, Demand], limits: Sequence[Limit]) -> list[int] | None:
    """The optimal choices, or None where there are none."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    count = len(objective)
    constraints = []
    for demand in demands.values():
        constraints.append(LinearConstraint(np.asarray([demand.saves], dtype=float), demand.low, demand.high))
    if limits:
        rows = np.repeat(np.arange(len(limits)), [len(limit.members) for limit in limits])
        columns = np.concatenate([np.asarray(limit.members, dtype=int) for limit in limits])
        matrix = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(limits), count)).tocsc()
        constraints.append(LinearConstraint(matrix, [limit.low for limit in limits], [limit.high for limit in limits]))
    scale = np.abs(objective).max(initial=0.0) or 1.0  # losses may be 1e-9: below the solver's tolerances
    result = milp(
        objective / scale,
        integrality=np.ones(count),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"time_limit": TIME_LIMIT, "mip_rel_gap": 0.0},
    )
    return None if result.x is None else [int(i) for i in np.flatnonzero(result.x > 0.5)]
