"""Times in turns, peaks that are peaks."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from genprune.errors import GenpruneError
from genprune.metrics import compare_latency, device_name, peak_memory

MIB = 2**20


def test_ratios_and_their_intervals():
    calls = {"dense": lambda: time.sleep(0.06), "fast": lambda: time.sleep(0.015)}
    timing = compare_latency(calls, "dense", rounds=8, warmup=1)
    assert timing.median_ms["dense"] >= 60 and timing.median_ms["fast"] >= 15
    assert 0.2 < timing.ratio["fast"].estimate < 0.75  # a quarter; a loaded machine oversleeps
    assert timing.ratio["fast"].low <= timing.ratio["fast"].estimate <= timing.ratio["fast"].high
    assert timing.ratio["dense"].estimate == timing.ratio["dense"].low == 1
    assert timing.device == device_name() and timing.threads == torch.get_num_threads()
    assert device_name() in str(timing) and "8 rounds" in str(timing)


def test_calls_take_turns_in_changing_order_and_warm_up_is_not_counted():
    order = []
    names = "abc"
    timing = compare_latency({n: lambda n=n: order.append(n) for n in names}, "a", rounds=6, warmup=2)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(rounds) == 8 and all(sorted(r) == list(names) for r in rounds)
    assert len(set(rounds)) > 1
    assert all(len(samples) == 6 for samples in timing.samples_ms.values())


def test_a_slow_spell_hits_both_sides_of_a_ratio():
    turn = {"n": 0}

    def sleep(milliseconds):
        turn["n"] += 1
        time.sleep(milliseconds / 1000 * (5 if turn["n"] > 8 else 1))  # the machine slows down halfway

    timing = compare_latency({"a": lambda: sleep(15), "b": lambda: sleep(15)}, "a", rounds=8, warmup=0)
    assert timing.ratio["b"].estimate == pytest.approx(1, abs=0.5)  # one after the other would give 5


def test_latency_errors():
    with pytest.raises(GenpruneError, match=r"baseline 'x', calls \['a', 'b'\]"):
        compare_latency({"a": int, "b": int}, "x")
    with pytest.raises(GenpruneError, match="1 rounds"):
        compare_latency({"a": int, "b": int}, "a", rounds=1)


def test_peak_is_seen_although_it_is_gone_at_the_end():
    def run():
        block = torch.ones(40 * MIB, dtype=torch.float32)  # 160 MiB, more than any cache of the allocator
        time.sleep(0.5)  # long enough for the sampling thread on a busy machine
        del block

    quiet, loud = peak_memory(lambda: time.sleep(0.05)), peak_memory(run)
    assert loud.extra_bytes > 150 * MIB
    assert quiet.extra_bytes < 50 * MIB
    assert loud.method == "rss-sampled" and loud.device == device_name()


def test_peak_of_a_fresh_process_is_its_own():
    ballast = torch.ones(200 * MIB, dtype=torch.float32)  # 800 MiB here must not count there
    program = "from genprune.metrics.memory import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 50 * MIB < int(done.stdout) < 700 * MIB  # torch alone is 200 to 500 MiB
    del ballast
