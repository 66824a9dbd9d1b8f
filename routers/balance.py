"""What a router does to a stream of prompts: how many go where, what they cost, and how a budget is kept."""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genprune.errors import GenpruneError
from genprune.routers.experts import Routes

logger = logging.getLogger(__name__)

ENOUGH = 100  # prompts before a drift is judged
WINDOW = 1000  # latest prompts by which it is judged
RARE = 1e-3  # probability of a stream like this one under the trained balance
FAR = 0.1  # total variation distance
OFF = 0.02  # of the mean budget, relative
_SMOOTHING = 1e-3  # share that an expert without training prompts may get


class RouteStatistics:
    """Counts of what ran, and its true mean cost.

    Args:
        shares: MACs that each expert keeps, of the dense model.
        usage: share of the training prompts of each expert; zeros where it is unknown, then no drift is judged.
        target: mean share of MACs that the router was trained for.

    Attributes:
        counts: prompts of each expert.
        unfamiliar: how many were unlike the training prompts.
    """

    def __init__(self, shares: Sequence[float], usage: Sequence[float], target: float) -> None:
        if len(shares) != len(usage) or not shares:
            raise GenpruneError(
                f"there are {len(shares)} shares of MACs and {len(usage)} of usage; expected one of each for every "
                "expert. Use RouteStatistics.of(router)."
            )
        self.shares, self.usage, self.target = tuple(shares), tuple(usage), float(target)
        self.reset()

    @classmethod
    def of(cls, router) -> RouteStatistics:
        """Statistics for a router, empty."""
        return cls(router.shares, router.usage, router.target)

    def reset(self) -> None:
        """Forget all prompts."""
        self.counts = [0] * len(self.shares)
        self.unfamiliar = 0
        self._runs = [0] * len(self.shares)
        self._recent: deque[int] = deque(maxlen=WINDOW)
        self._drifting = False

    def update(self, routes: Routes | Sequence[int], runs: int = 1) -> None:
        """Count what ran. A drift is logged once as it begins.

        Args:
            routes: what `route` gave, or the expert of each prompt where a user chose it.
            runs: pictures of each prompt, >= 1: they count for the mean cost.
        """
        experts = routes.experts if isinstance(routes, Routes) else tuple(routes)
        if wrong := [expert for expert in experts if not 0 <= expert < len(self.shares)]:
            raise GenpruneError(
                f"expert {wrong[0]} was counted; expected one of 0 ... {len(self.shares) - 1}. Use the statistics of "
                "the router that gave the routes."
            )
        for expert in experts:
            self.counts[expert] += 1
            self._runs[expert] += runs
        self._recent.extend(experts)
        if isinstance(routes, Routes):
            self.unfamiliar += sum(reason is not None for reason in routes.unfamiliar)
        found = self.drift()
        if found and not self._drifting:
            logger.warning("%s", found)
        self._drifting = found is not None

    @property
    def prompts(self) -> int:
        """How many were counted."""
        return sum(self.counts)

    @property
    def mean_share(self) -> float | None:
        """MACs of what ran, as a share of the dense model's: the true mean; None before anything ran."""
        return mean_share(self._runs, self.shares)

    def drift(self) -> str | None:
        """How the latest prompts have left the trained balance, in words; None where they have not, or are too few."""
        recent = Counter(self._recent)
        return drift([recent[expert] for expert in range(len(self.shares))], self.usage, self.shares)

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON data."""
        return {
            "prompts": self.prompts,
            "counts": list(self.counts),
            "shares": list(self.shares),
            "usage": list(self.usage),
            "target": self.target,
            "mean_share": self.mean_share,
            "unfamiliar": self.unfamiliar,
            "drift": self.drift(),
        }

    def __str__(self) -> str:
        if not self.prompts:
            return "no prompts yet"
        lines = ["expert  prompts   here  training   MACs"]
        for expert, (count, usage, share) in enumerate(zip(self.counts, self.usage, self.shares)):
            lines.append(f"{expert:>6} {count:>8,} {count / self.prompts:>6.1%} {usage:>9.1%} {share:>6.1%}")
        lines.append(
            f"{self.prompts:,} prompts at {self.mean_share:.1%} of the dense MACs on average, trained for "
            f"{self.target:.1%}; {self.unfamiliar:,} unlike the training prompts"
        )
        if found := self.drift():
            lines.append(found)
        return "\n".join(lines)


def mean_share(counts: Sequence[float], shares: Sequence[float]) -> float | None:
    """Mean of the experts' shares under counts or weights; None where all are 0."""
    total = math.fsum(counts)
    return math.fsum(count * share for count, share in zip(counts, shares)) / total if total else None


def drift(counts: Sequence[int], usage: Sequence[float], shares: Sequence[float]) -> str | None:
    """How a stream of prompts has left the trained balance, in words; None where it has not.

    It has where 100 prompts or more are spread as the trained balance would spread fewer than one such stream in a
    thousand (likelihood-ratio test), and that matters: one prompt in ten goes elsewhere, or the mean cost is off by
    2 %.

    Args:
        counts: prompts of each expert.
        usage: share of the training prompts of each.
        shares: MACs that each keeps.
    """
    total, trained = sum(counts), math.fsum(usage)
    if total < ENOUGH or len(counts) < 2 or not trained:
        return None
    expected = [share / trained for share in usage]
    smooth = [(share + _SMOOTHING) / (1 + _SMOOTHING * len(usage)) for share in expected]
    likelihood_ratio = 2 * math.fsum(n * math.log(n / (total * q)) for n, q in zip(counts, smooth) if n)
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    half = torch.tensor(max(0.0, likelihood_ratio) / 2, dtype=torch.float64)
    if float(torch.special.gammaincc(freedom, half)) >= RARE:
        return None
    here = [n / total for n in counts]
    distance = math.fsum(abs(a - b) for a, b in zip(here, expected)) / 2
    cost, before = mean_share(counts, shares), mean_share(expected, shares)
    if distance <= FAR and abs(cost / before - 1) <= OFF:
        return None
    most = max(range(len(counts)), key=lambda k: abs(here[k] - expected[k]))
    return (
        f"prompts have left the balance that the router was trained on: {distance:.0%} of the last {total:,} go to "
        f"other experts, most of all expert {most} with {here[most]:.0%} instead of {expected[most]:.0%}; they cost "
        f"{cost:.1%} of the dense MACs on average instead of {before:.1%}. To keep the budget route with "
        "capacity=True, or train a router on prompts like these."
    )


def keep_budget(
    similarities: Tensor, experts: Sequence[int], shares: Sequence[float], target: float, fixed: Sequence[bool]
) -> tuple[int, ...]:
    """The experts of a batch under a mean budget: argmax_k S_ik - lambda * share_k with the smallest such lambda >= 0.

    The one place where the expert of a prompt depends on its batch. Prompts with the same similarities move together,
    so that the order of the batch does not count.

    Args:
        similarities: S, shape `(prompts, K)`.
        experts: what `lambda = 0` gives. Where it meets the budget it stays.
        shares: cost of each expert.
        target: mean of them that is not to be passed.
        fixed: prompts that do not move, though they count.

    Returns:
        An expert for each prompt. Where even the cheapest experts pass the budget they are what is returned.
    """
    chosen = list(experts)
    counts = Counter(chosen)
    moves = [
        (price, index, expert)
        for index, start in enumerate(experts)
        if not fixed[index]
        for price, expert in _moves(similarities[index].tolist(), start, shares)
    ]
    moves.sort(key=lambda move: move[0])  # stable: a prompt's own moves stay in their order
    position, limit = 0, target + 1e-12
    while position < len(moves) and mean_share([counts[k] for k in range(len(shares))], shares) > limit:
        price = moves[position][0]
        while position < len(moves) and moves[position][0] == price:
            _, index, expert = moves[position]
            counts[chosen[index]] -= 1
            counts[expert] += 1
            chosen[index] = expert
            position += 1
    return tuple(chosen)


def _moves(similarity: Sequence[float], start: int, shares: Sequence[float]) -> list[tuple[float, int]]:
    """(lambda, expert) of each change of argmax_k S_k - lambda * share_k as lambda grows; ties: the cheapest."""
    found, current = [], start
    while True:
        prices = [
            ((similarity[current] - similarity[k]) / (shares[current] - shares[k]), shares[k], k)
            for k in range(len(shares))
            if shares[k] < shares[current]
        ]
        if not prices:
            return found
        price, _, current = min(prices)
        # rising but for rounding, which must not change the order of one prompt's moves
        found.append((max(price, found[-1][0]) if found else price, current))
