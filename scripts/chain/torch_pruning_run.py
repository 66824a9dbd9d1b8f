"""Torch-Pruning on the same SD 1.5 with the same random weights: tracing its groups, scoring and cutting."""

from __future__ import annotations

import importlib.metadata
import time
from typing import Any

import torch

from scripts.chain.hosts import random_host
from scripts.chain.phases import measured


def run_torch_pruning(keep: float = 0.7) -> dict[str, Any]:
    """Seconds and peak memory of Torch-Pruning's magnitude pruner, or why it could not run.

    The example input is the smallest that the U-Net takes (8 x 8 latents), which is kind to its tracing pass.
    Its `pruning_ratio` is a share of channels, not of parameters, so the sizes after the cut differ from ours.
    """
    try:
        import torch_pruning
    except ModuleNotFoundError:
        return {"skipped": "torch-pruning is not installed; `pip install torch-pruning` and run again to compare."}
    model = random_host("sd15", torch.bfloat16).requires_grad_(True)
    inputs = {
        "sample": torch.randn(1, 4, 8, 8, dtype=torch.bfloat16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 77, 768, dtype=torch.bfloat16),
    }
    before = sum(p.numel() for p in model.parameters())
    pruner, trace = measured(
        lambda: torch_pruning.pruner.MagnitudePruner(
            model,
            inputs,
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=1 - keep,
            ignored_layers=[model.conv_out],
        )
    )
    cut_alone, step = measured(lambda: _step(pruner))
    return {
        "version": importlib.metadata.version("torch-pruning"),
        "dtype": "bfloat16",
        "phases": {"trace": trace, "score_and_cut": step},
        "cut_alone": cut_alone,
        "params_before": before,
        "params_after": sum(p.numel() for p in model.parameters()),
    }


def _step(pruner) -> dict[str, float]:
    """`pruner.step()`, with the time that goes into changing layers apart from scoring and choosing."""
    seconds = cpu_seconds = 0.0
    for group in pruner.step(interactive=True):
        started, computed = time.perf_counter(), time.process_time()
        group.prune()
        seconds += time.perf_counter() - started
        cpu_seconds += time.process_time() - computed
    return {"seconds": round(seconds, 4), "cpu_seconds": round(cpu_seconds, 4)}
