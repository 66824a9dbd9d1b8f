"""Latency of every plan against the dense denoiser, in turns in one process, at batch 1 and 8."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch

import genprune as gp
from genprune.families import OperatingPoint, denoiser, family_of
from genprune.metrics.latency import compare_latency

ROUNDS = 15


@torch.inference_mode()
def latencies(pipe, plans: dict[str, gp.PruningPlan]) -> dict[str, Any]:
    """Plan -> ratio of its denoiser call to the dense one, with interval, for batches of 1 and 8."""
    model = denoiser(pipe).eval()
    cuts = {slug: gp.cut(copy.deepcopy(model), plan) for slug, plan in plans.items()}
    found: dict[str, Any] = {}
    for batch in (1, 8):
        point = OperatingPoint(**{**next(iter(plans.values())).operating_point, "batch": batch})
        inputs = family_of(model).example_inputs(model, point, "cpu", torch.float32)
        calls = {slug: functools.partial(each, **inputs) for slug, each in {"dense": model, **cuts}.items()}
        timed = compare_latency(calls, "dense", device="cpu", rounds=ROUNDS)
        found[f"batch {batch}"] = {
            "dense_ms": timed.median_ms["dense"],
            "device": timed.device,
            "threads": timed.threads,
            "ratio": {slug: timed.ratio[slug].to_json() for slug in plans},
        }
    return found
