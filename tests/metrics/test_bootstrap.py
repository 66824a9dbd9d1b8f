"""Bootstrap intervals against theory, and what pairing buys."""

from __future__ import annotations

import pytest
import torch

from genprune.errors import GenpruneError
from genprune.metrics import BadImages, bootstrap_interval, paired_difference
from genprune.metrics.bootstrap import median


def normal(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_interval_of_a_mean_is_the_normal_one():
    values = 3 + 2 * normal(400, 0)
    interval = bootstrap_interval(values)
    half = 1.96 * values.std().item() / 20
    assert interval.estimate == pytest.approx(values.mean().item())
    # 2,000 resamples place each end within about 5 % of the half-width
    assert interval.low == pytest.approx(interval.estimate - half, abs=0.12 * half)
    assert interval.high == pytest.approx(interval.estimate + half, abs=0.12 * half)
    assert (interval.level, interval.count) == (0.95, 400)
    narrow = bootstrap_interval(values, level=0.5)
    assert narrow.high - narrow.low < 0.45 * (interval.high - interval.low)


def test_covers_the_truth_as_often_as_it_says():
    hits = sum(
        interval.low <= 0 <= interval.high
        for interval in (bootstrap_interval(normal(60, seed), resamples=400) for seed in range(200))
    )
    assert 0.88 <= hits / 200 <= 0.99  # 95 % within three standard errors of 200 trials, and the bias at 60 values


def test_pairing_sees_what_the_spread_between_prompts_hides():
    prompts = 10 * normal(50, 0)
    dense, pruned = prompts + 0.1 * normal(50, 1), prompts - 0.5 + 0.1 * normal(50, 2)
    paired = paired_difference(pruned, dense)
    assert paired.high < 0 and paired.excludes_zero
    assert paired.estimate == pytest.approx((pruned - dense).mean().item())
    alone = bootstrap_interval(pruned)
    assert alone.high - alone.low > 20 * (paired.high - paired.low)
    assert not paired_difference(dense, dense.flip(0)).excludes_zero


def test_same_seed_same_interval_and_no_trace_in_the_random_state():
    values = normal(30, 0)
    state = torch.get_rng_state()
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    assert torch.equal(torch.get_rng_state(), state)


def test_median_ignores_an_outlier():
    values = torch.cat([torch.ones(20), torch.full((1,), 1e6)])
    assert bootstrap_interval(values, median).high == 1
    assert bootstrap_interval(torch.tensor([1.0, 2.0, 4.0, 8.0]), median).estimate == 3


def test_errors():
    with pytest.raises(BadImages, match=r"at least 2 finite values in one dimension, got shape \(1,\)"):
        bootstrap_interval(torch.ones(1))
    with pytest.raises(BadImages, match="with NaN or infinity"):
        bootstrap_interval(torch.tensor([1.0, float("nan")]))
    with pytest.raises(GenpruneError, match="level is 95 and resamples is 2000, expected 0 < level < 1"):
        bootstrap_interval(torch.ones(3), level=95)
    with pytest.raises(BadImages, match=r"\(3,\) and \(4,\).*same prompts and seeds"):
        paired_difference(torch.ones(3), torch.ones(4))
