"""How long calls take beside each other, timed in turns so that a busy or throttling machine hits all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from genprune.errors import GenpruneError
from genprune.metrics.bootstrap import Interval, bootstrap_interval, median
from genprune.metrics.device import device_name, synchronize


@dataclass(frozen=True)
class LatencyComparison:
    """Times of several calls, and of each against the baseline.

    Attributes:
        baseline: name of the call that ratios are against (< 1 is faster than it).
        median_ms: per call, over rounds.
        ratio: per call, the median over rounds of `time / baseline's time in the same round`, with its interval.
        samples_ms: per call, every round.
        device: what it ran on, in words.
        threads: CPU threads torch used.
        rounds: timed rounds, after the warm-up.
    """

    baseline: str
    median_ms: dict[str, float]
    ratio: dict[str, Interval]
    samples_ms: dict[str, tuple[float, ...]]
    device: str
    threads: int
    rounds: int

    def __str__(self) -> str:
        rows = [f"{name}: {ms:.2f} ms, x{self.ratio[name]} of {self.baseline}" for name, ms in self.median_ms.items()]
        return "\n".join([*rows, f"on {self.device}, {self.threads} threads, {self.rounds} rounds"])

    def to_json(self) -> dict:
        return {
            "baseline": self.baseline,
            "median_ms": self.median_ms,
            "ratio": {name: interval.to_json() for name, interval in self.ratio.items()},
            "device": self.device,
            "threads": self.threads,
            "rounds": self.rounds,
        }


def compare_latency(
    calls: Mapping[str, Callable[[], object]],
    baseline: str,
    device: torch.device | str = "cpu",
    rounds: int = 20,
    warmup: int = 3,
    seed: int = 0,
) -> LatencyComparison:
    """Median time of each call and its ratio to the baseline's, with a 95 % bootstrap interval over rounds.

    Each round runs every call once, in a shuffled order, and ratios are taken within a round: a drift of the clock
    speed or a neighbour's load falls on both sides of a ratio.

    Args:
        calls: by name, functions of no argument that do the work; at least two.
        baseline: the name that ratios are against, e.g. `dense`.
        device: where the work runs; an accelerator is synchronised around each call.
        rounds: timed rounds, >= 2.
        warmup: rounds that are not timed (allocation, compilation, caches).
        seed: of the order within rounds.

    Raises:
        GenpruneError: the baseline is no call, or there are too few calls or rounds.
    """
    if baseline not in calls or len(calls) < 2 or rounds < 2:
        raise GenpruneError(
            f"timing needs a baseline among at least 2 calls, and 2 rounds; got baseline '{baseline}', calls "
            f"{list(calls)} and {rounds} rounds."
        )
    shuffle = random.Random(seed).shuffle
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + rounds):
        shuffle(names)
        for name in names:
            synchronize(device)
            start = time.perf_counter()
            calls[name]()
            synchronize(device)
            if turn >= warmup:
                samples[name].append((time.perf_counter() - start) * 1000)
    times = {name: torch.tensor(samples[name], dtype=torch.float64) for name in calls}
    return LatencyComparison(
        baseline=baseline,
        median_ms={name: median(values).item() for name, values in times.items()},
        ratio={
            name: bootstrap_interval(values / times[baseline], median, seed=seed) for name, values in times.items()
        },
        samples_ms={name: tuple(samples[name]) for name in calls},
        device=device_name(device),
        threads=torch.get_num_threads(),
        rounds=rounds,
    )
