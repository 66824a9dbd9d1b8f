"""The exact 0/1 selection: agrees with brute force, honours every limit, and says what binds."""

from __future__ import annotations

import itertools
import random

import pytest

from genprune.allocation.knapsack import Demand, Knapsack, Limit
from genprune.errors import BudgetUnreachable


def brute_force(problem: Knapsack) -> float | None:
    """The least loss over all subsets, or None where none is allowed."""
    best = None
    count = len(problem.losses)
    for chosen in itertools.product((0, 1), repeat=count):
        saved = {q: sum(p * x for p, x in zip(d.saves, chosen)) for q, d in problem.demands.items()}
        if any(not d.low - 1e-9 <= saved[q] <= d.high + 1e-9 for q, d in problem.demands.items()):
            continue
        if any(not g.low <= sum(chosen[i] for i in g.members) <= g.high for g in problem.limits):
            continue
        loss = sum(loss * x for loss, x in zip(problem.losses, chosen))
        best = loss if best is None else min(best, loss)
    return best


def random_problem(seed: int) -> Knapsack:
    draw = random.Random(seed)
    count = draw.randint(3, 9)
    losses = tuple(draw.random() * 10 ** draw.randint(-9, 2) for _ in range(count))
    shares = [tuple(draw.randint(1, 20) / 100 for _ in range(count)) for _ in range(2)]
    demands = {"params": Demand(shares[0], draw.randint(5, 40) / 100)}
    if seed % 2:
        demands["macs"] = Demand(shares[1], draw.randint(5, 30) / 100, high=draw.randint(40, 90) / 100)
    limits = [Limit(tuple(draw.sample(range(count), 2)), 0, 1, "exclusion") for _ in range(draw.randint(0, 3))]
    if seed % 3 == 0:
        limits.append(Limit(tuple(range(min(3, count))), 1, 2, "group"))
    return Knapsack(losses, demands, tuple(limits))


@pytest.mark.parametrize("seed", range(60))
def test_brute_force_agrees(seed):
    problem = random_problem(seed)
    best = brute_force(problem)
    if best is None:
        with pytest.raises(BudgetUnreachable):
            problem.solve()
        return
    taken = problem.solve()
    assert sum(problem.losses[i] for i in taken) == pytest.approx(best, rel=1e-6, abs=1e-6 * max(problem.losses))


def test_the_cheap_pair_beats_the_greedy_single():
    # greedy by loss takes choice 0 first and then needs both others
    problem = Knapsack((1.0, 1.5, 1.5), {"params": Demand((0.1, 0.25, 0.25), 0.5)})
    assert problem.solve() == [1, 2]


def test_an_unreachable_budget_says_how_much_may_go():
    problem = Knapsack((1.0, 1.0), {"macs": Demand((0.2, 0.27), 0.5)})
    with pytest.raises(BudgetUnreachable, match=r"budget on macs asks for 50\.0%.*47\.0%.*keep of at least 0\.530"):
        problem.solve()


def test_the_limit_that_binds_is_named():
    limits = (Limit((0, 1), 0, 1, "max_consecutive=1"), Limit((1, 2), 0, 2, "nested layers"))
    problem = Knapsack((1.0, 1.0, 1.0), {"params": Demand((0.3, 0.3, 0.1), 0.65)}, limits)
    with pytest.raises(BudgetUnreachable, match="without max_consecutive=1 it could"):
        problem.solve()


def test_budgets_that_exclude_each_other_are_named():
    demands = {"params": Demand((0.5, 0.0), 0.4), "macs": Demand((0.4, 0.4), 0.1, high=0.2)}
    with pytest.raises(BudgetUnreachable, match="params, macs can each be met, but not together.*without the one on"):
        Knapsack((1.0, 1.0), demands).solve()


def test_a_group_that_contradicts_the_budget_is_named():
    problem = Knapsack(
        (1.0, 1.0), {"params": Demand((0.3, 0.3), 0.2, high=0.4)}, (Limit((0, 1), 2, 2, "n_of_m=(0, 2)"),)
    )
    with pytest.raises(BudgetUnreachable, match=r"not with, n_of_m=\(0, 2\)"):
        problem.solve()


def test_steps_too_coarse_for_the_window():
    with pytest.raises(BudgetUnreachable, match="coarser"):
        Knapsack((1.0,), {"params": Demand((0.5,), 0.2, high=0.3)}).solve()
