"""What runs is counted truly, a drift is told once, and a budget is kept where that is asked for."""

from __future__ import annotations

import json
import logging
import random
from fractions import Fraction

import pytest
import tiny_pipelines
import torch
from router_cases import WORDS, small_router

import genprune as gp
from genprune.routers import Routes, RouteStatistics
from genprune.routers.balance import _moves, drift, keep_budget, mean_share

SHARES, USAGE = (0.4, 0.6, 0.9), (0.5, 0.3, 0.2)


@pytest.fixture(scope="module")
def router(tmp_path_factory):
    return small_router(tiny_pipelines.sd_pipeline(tmp_path_factory.mktemp("sd")), 4)


def routes_to(*experts: int, strange: int = 0) -> Routes:
    reasons = tuple("strange" if index < strange else None for index in range(len(experts)))
    return Routes(tuple(experts), torch.zeros(len(experts), 3, dtype=torch.float64), reasons)


def stream(weights, count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(len(weights)), weights, k=count)


# ---- counting -------------------------------------------------------------------------------------------------------


def test_a_skewed_stream_reports_its_true_mean(router):
    """Row 12: the release's budget holds under the training mixture alone."""
    statistics = RouteStatistics.of(router)
    prompts = [WORDS[0]] * 30 + WORDS + ["old house of cats"] * 7
    chosen = []
    for start in range(0, len(prompts), 9):
        routes = router.route(prompts[start : start + 9])
        statistics.update(routes)
        chosen += routes.experts
    assert statistics.prompts == len(prompts) == len(chosen)
    assert statistics.counts == [chosen.count(expert) for expert in range(4)]
    assert statistics.mean_share == pytest.approx(sum(router.shares[expert] for expert in chosen) / len(chosen))
    assert abs(statistics.mean_share - router.trained_share) > 0.01


def test_pictures_count_for_the_mean_and_prompts_for_the_balance():
    statistics = RouteStatistics(SHARES, USAGE, 0.56)
    statistics.update(routes_to(0, 0, 2, strange=2), runs=1)
    statistics.update([1], runs=4)
    assert statistics.counts == [2, 1, 1] and statistics.unfamiliar == 2
    assert statistics.mean_share == pytest.approx((0.4 + 0.4 + 0.9 + 4 * 0.6) / 7)
    data = json.loads(json.dumps(statistics.to_json()))
    assert (data["prompts"], data["counts"], data["unfamiliar"], data["target"]) == (4, [2, 1, 1], 2, 0.56)
    assert f"4 prompts at {statistics.mean_share:.1%} of the dense MACs" in str(statistics)
    statistics.reset()
    assert statistics.prompts == 0 and statistics.mean_share is None and str(statistics) == "no prompts yet"


def test_statistics_of_another_router_are_refused():
    statistics = RouteStatistics(SHARES, USAGE, 0.56)
    with pytest.raises(gp.GenpruneError, match=r"expert 3 was counted; expected one of 0 ... 2"):
        statistics.update([0, 3])
    assert statistics.prompts == 0
    with pytest.raises(gp.GenpruneError, match="3 shares of MACs and 1 of usage"):
        RouteStatistics(SHARES, (1.0,), 0.5)


# ---- drift ----------------------------------------------------------------------------------------------------------


def test_traffic_as_trained_is_no_drift():
    told = []
    for seed in range(200):
        chosen = stream(USAGE, 300, seed)
        told.append(drift([chosen.count(expert) for expert in range(3)], USAGE, SHARES))
    assert sum(each is not None for each in told) <= 2  # a test at one in a thousand


@pytest.mark.parametrize(
    ("counts", "drifts"),
    [
        ((0, 0, 99), False),  # too few
        ((0, 0, 100), True),
        ((500, 300, 200), False),
        ((53_000, 28_000, 19_000), False),  # beyond chance, but 3 % of the prompts and 1 % of the cost
        ((44_000, 33_000, 23_000), True),  # 6 % of the prompts, 4 % of the cost
        ((60, 25, 15), False),  # a tenth of the prompts, but within chance
    ],
)
def test_a_drift_is_beyond_chance_and_matters(counts, drifts):
    assert (drift(counts, USAGE, SHARES) is not None) == drifts


def test_the_probability_is_that_of_a_likelihood_ratio_test():
    """At the edge of one in a thousand, against scipy's test."""
    from scipy.stats import power_divergence

    usage = torch.tensor(USAGE, dtype=torch.float64)
    smooth = (usage + 1e-3) / (1 + 3e-3)
    verdicts = set()
    for moved in range(0, 400, 5):
        counts = [1000 - moved, 600, 400 + moved]
        probability = power_divergence(counts, (smooth * 2000).tolist(), lambda_="log-likelihood").pvalue
        cost = mean_share(counts, SHARES) / mean_share(USAGE, SHARES) - 1
        matters = moved / 2000 > 0.1 or abs(cost) > 0.02
        assert (drift(counts, USAGE, SHARES) is not None) == (probability < 1e-3 and matters)
        verdicts.add((bool(probability < 1e-3), matters))
    assert len(verdicts) == 3


def test_a_drift_says_what_changed():
    told = drift((0, 0, 1000), USAGE, SHARES)
    assert "80% of the last 1,000 go to other experts, most of all expert 2 with 100% instead of 20%" in told
    assert "90.0% of the dense MACs on average instead of 56.0%" in told and "capacity=True" in told
    assert drift((1000,), (1.0,), (0.5,)) is None  # one expert
    assert drift((0, 0, 1000), (0.0, 0.0, 0.0), SHARES) is None  # nothing known of the training
    assert drift((0, 0, 1000), (0.6, 0.4, 0.0), SHARES) is not None  # to an expert that had no prompts


def test_a_drift_is_told_once_each_time_it_begins(caplog):
    statistics = RouteStatistics(SHARES, USAGE, 0.56)
    with caplog.at_level(logging.WARNING, "genprune"):
        for _ in range(10):
            statistics.update([0, 1, 2, 2, 2, 2, 2] * 10)
        assert len(caplog.records) == 1 and "have left the balance" in caplog.text
        for _ in range(10):  # the last 1,000 prompts are judged
            statistics.update([0] * 50 + [1] * 30 + [2] * 20)
        assert statistics.drift() is None and len(caplog.records) == 1
        for _ in range(10):
            statistics.update([2] * 100)
        assert len(caplog.records) == 2
    assert "have left the balance" in str(statistics)


# ---- capacity -------------------------------------------------------------------------------------------------------


def random_batch(seed: int, prompts: int = 12, experts: int = 4):
    generator = torch.Generator().manual_seed(seed)
    similarities = torch.rand(prompts, experts, dtype=torch.float64, generator=generator)
    if seed % 2:  # ties and duplicates
        similarities = (similarities * 4).round() / 4
        similarities[1::2] = similarities[::2]
    shares = (torch.rand(experts, dtype=torch.float64, generator=generator) * 0.7 + 0.3).tolist()
    return similarities, [row.tolist().index(float(row.max())) for row in similarities], shares


def by_hand(similarities, shares, target) -> tuple[int, ...]:
    """The definition, in exact fractions: argmax at every price where two experts are level, the smallest first."""
    rows, costs = [[Fraction(s) for s in row] for row in similarities.tolist()], [Fraction(c) for c in shares]
    pairs = [(j, k) for j in range(len(costs)) for k in range(len(costs)) if costs[j] > costs[k]]
    prices = {Fraction(0)} | {(row[j] - row[k]) / (costs[j] - costs[k]) for row in rows for j, k in pairs}
    for price in sorted(price for price in prices if price >= 0):
        chosen = [max(range(len(costs)), key=lambda k: (row[k] - price * costs[k], -costs[k])) for row in rows]
        if sum(shares[k] for k in chosen) / len(chosen) <= target + 1e-12:
            return tuple(chosen)


@pytest.mark.parametrize("seed", range(8))
def test_the_budget_of_a_batch_is_met_at_the_smallest_price(seed):
    similarities, experts, shares = random_batch(seed)
    before = sum(shares[k] for k in experts) / len(experts)
    for target in (before - 0.02, (before + min(shares)) / 2, min(shares)):
        if target < min(shares):
            continue
        chosen = keep_budget(similarities, experts, shares, target, [False] * len(experts))
        assert sum(shares[k] for k in chosen) / len(chosen) <= target + 1e-12
        assert chosen == by_hand(similarities, shares, target)


def test_a_budget_that_is_met_changes_nothing():
    for seed in range(8):
        similarities, experts, shares = random_batch(seed)
        before = sum(shares[k] for k in experts) / len(experts)
        assert keep_budget(similarities, experts, shares, before, [False] * 12) == tuple(experts)
        assert keep_budget(similarities, experts, shares, 1.0, [False] * 12) == tuple(experts)


def test_a_budget_does_not_depend_on_the_order_of_the_batch():
    for seed in range(8):
        similarities, experts, shares = random_batch(seed)
        target = (sum(shares[k] for k in experts) / len(experts) + min(shares)) / 2
        chosen = keep_budget(similarities, experts, shares, target, [False] * 12)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).tolist()
        again = keep_budget(similarities[order], [experts[i] for i in order], shares, target, [False] * 12)
        assert again == tuple(chosen[i] for i in order)
        same = {}
        for row, expert in zip(similarities.tolist(), chosen):
            assert same.setdefault(tuple(row), expert) == expert  # duplicates go together


def test_the_moves_of_a_prompt_keep_their_order_under_rounding():
    """Similarities in one line with the shares: every price is the same but for rounding."""
    for seed in range(100):
        draw = random.Random(seed)
        shares, slope = [draw.uniform(0.3, 1) for _ in range(6)], draw.uniform(0.1, 2)
        similarity = [slope * share for share in shares]
        prices = [price for price, _ in _moves(similarity, similarity.index(max(similarity)), shares)]
        assert prices == sorted(prices)


def test_the_cheapest_loss_of_similarity_goes_first():
    shares = (0.5, 1.0)
    similarities = torch.tensor([[0.1, 0.9], [0.5, 0.6], [0.3, 0.8]], dtype=torch.float64)
    assert keep_budget(similarities, (1, 1, 1), shares, 0.9, [False] * 3) == (1, 0, 1)
    assert keep_budget(similarities, (1, 1, 1), shares, 0.7, [False] * 3) == (1, 0, 0)
    assert keep_budget(similarities, (1, 1, 1), shares, 0.7, [False, True, False]) == (0, 1, 0)
    assert keep_budget(similarities, (1, 1, 1), shares, 0.1, [False] * 3) == (0, 0, 0)  # as near as can be


def test_a_router_keeps_its_budget_on_a_skewed_batch(tmp_path, caplog):
    router = small_router(tiny_pipelines.sd_pipeline(tmp_path), 4, training={"target": 0.7})
    most = router.largest
    prompts = [prompt for prompt in WORDS if router(prompt) == (most,)] * 6 + WORDS
    plain, kept = router.route(prompts), router.route(prompts, capacity=True)
    assert mean_share([plain.experts.count(k) for k in range(4)], router.shares) > 0.7
    assert mean_share([kept.experts.count(k) for k in range(4)], router.shares) <= 0.7 + 1e-12
    assert torch.equal(plain.similarities, kept.similarities) and not caplog.records
    assert router.route(prompts, capacity=True) == kept
    assert router.route(prompts[::-1], capacity=True).experts == kept.experts[::-1]
    cheapest = [prompt for prompt in WORDS if router.shares[router(prompt)[0]] <= 0.7]
    assert router.route(cheapest, capacity=True) == router.route(cheapest)  # met already


def test_a_budget_that_cannot_be_kept_is_said(tmp_path, caplog):
    router = small_router(tiny_pipelines.sd_pipeline(tmp_path), 2, training={"target": 0.3})
    with caplog.at_level(logging.WARNING, "genprune"):
        routes = router.route(WORDS, capacity=True)
    assert set(routes.experts) == {router.shares.index(min(router.shares))}
    assert "cannot be brought to the budget of 30.0 %" in caplog.text
