"""How much of the MACs that a cut saves shows up as time: dense and cut models timed in turns."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

import genprune as gp
from genprune.cutting import plan_base
from genprune.families import family_of
from genprune.metrics import compare_latency
from scripts.chain.hosts import HOSTS, random_host

WIDTH_KINDS = ("heads", "neurons", "channels")
WARMUP = 1  # rounds


def uniform_plan(model: nn.Module, width: float, round_to: int = 1, seed: int = 0) -> gp.PruningPlan:
    """A plan that keeps the same share of every head, neuron and channel site, in units picked at random.

    Args:
        width: share of each site that stays, in (0, 1].
        round_to: kept neurons are a multiple of this.
        seed: of the pick.
    """
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for name, site in gp.find_sites(model).items():
        if site.kind not in WIDTH_KINDS:
            continue
        step = round_to if site.kind == "neurons" and site.size >= round_to else 1
        kept = min(site.size, max(step, round(width * site.size / step) * step))
        mask = torch.zeros(site.size, dtype=torch.bool)
        mask[torch.randperm(site.size, generator=generator)[:kept]] = True
        keep[name] = mask
    return gp.PruningPlan(base=plan_base(model), keep=keep)


def measure_speed(
    host: str,
    widths: tuple[float, ...],
    quick: bool,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    round_to: int = 64,
    channels_last: bool = False,
    rounds: int = 5,
) -> dict[str, Any]:
    """Latency of every width against the dense model, beside the MACs, on this machine.

    Args:
        host: name in `HOSTS`.
        widths: shares that stay.
        quick: the host's smaller operating point.
        dtype, batch, round_to, channels_last: the setting; all recorded.
        rounds: timed rounds of a width, each running the dense and the cut model once in a shuffled order.

    Returns:
        Rows of `width`, `macs_ratio`, `latency_ratio` with its interval and `macs_saving_seen`
        = (1 - latency ratio) / (1 - MACs ratio), the same in CPU time, and the medians over widths.
    """
    dense = random_host(host, dtype)
    family, given = family_of(dense), HOSTS[host].quick_point if quick else HOSTS[host].point
    point = family.operating_point(dense, **given, batch=batch)
    dense_macs = gp.count_costs(dense, **asdict(point)).macs
    inputs = family.example_inputs(dense, point, "cpu", dtype)
    memory_format = torch.channels_last if channels_last else torch.preserve_format
    dense = dense.to(memory_format=memory_format)
    rows, timed = [], None
    for width in widths:  # dense and one width at a time: full-size hosts do not fit in memory five times
        cut = gp.cut(copy.deepcopy(dense), uniform_plan(dense, width, round_to)).to(memory_format=memory_format)
        macs_ratio = gp.count_costs(cut, **asdict(point)).macs / dense_macs
        cpu: dict[str, list[float]] = {"dense": [], "cut": []}
        calls = {
            "dense": partial(_counted, dense, inputs, cpu["dense"]),
            "cut": partial(_counted, cut, inputs, cpu["cut"]),
        }
        with torch.inference_mode():
            timed = compare_latency(calls, baseline="dense", rounds=rounds, warmup=WARMUP)
        ratio = timed.ratio["cut"]
        cpu_ratio = median(b / a for a, b in list(zip(cpu["dense"], cpu["cut"], strict=True))[WARMUP:])
        rows.append(
            {
                "width": width,
                "macs_ratio": macs_ratio,
                "latency_ratio": ratio.to_json(),
                "dense_ms": timed.median_ms["dense"],
                "cut_ms": timed.median_ms["cut"],
                "cpu_time_ratio": cpu_ratio,
                "macs_saving_seen": (1 - ratio.estimate) / (1 - macs_ratio),
                "macs_saving_seen_in_cpu_time": (1 - cpu_ratio) / (1 - macs_ratio),
            }
        )
        del cut, calls
    return {
        "host": host,
        "setting": {
            "dtype": str(dtype).removeprefix("torch."),
            "round_to": round_to,
            "channels_last": channels_last,
            "operating_point": asdict(point),
        },
        "device": timed.device,
        "threads": timed.threads,
        "rounds": rounds,
        "dense_macs": dense_macs,
        "rows": rows,
        "macs_saving_seen": median(row["macs_saving_seen"] for row in rows),
        "macs_saving_seen_in_cpu_time": median(row["macs_saving_seen_in_cpu_time"] for row in rows),
    }


def _counted(model: nn.Module, inputs: dict[str, Any], cpu_seconds: list[float]) -> None:
    """One call; what it computed on all threads is appended. Neighbours on the machine lengthen it less than time."""
    started = time.process_time()
    model(**inputs)
    cpu_seconds.append(time.process_time() - started)
