"""Hosts to score the layers of: real classes at real shapes with random weights, for cost and never for quality."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from scripts.chain.hosts import FLUX_MODERATE, SD15, fill_

DIT_B2 = {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64, "sample_size": 32}


@dataclass(frozen=True)
class Host:
    """One model to score.

    Args:
        build: makes it on the device in force.
        kinds: of sites that are scored.
        point, quick_point: fields of the operating point that are not the family's default.
        quick_every: of the layers in module order, every how many-th is scored by `--quick`.
    """

    build: Callable[[], nn.Module]
    kinds: tuple[str, ...]
    point: dict[str, int]
    quick_point: dict[str, int]
    quick_every: int = 1


def _unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**SD15)


def _dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(**DIT_B2)


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(**(FLUX_MODERATE | {"num_layers": 4, "num_single_layers": 8}))


HOSTS = {
    "unet": Host(_unet, ("branch", "block", "wrapper"), {"height": 32, "width": 32}, {"height": 16, "width": 16}, 6),
    "dit": Host(_dit, ("branch", "block"), {"batch": 2}, {}, 4),
    "flux": Host(
        _flux,
        ("branch", "block"),
        {"height": 32, "width": 32, "text_length": 128},
        {"height": 16, "width": 16, "text_length": 64},
        3,
    ),
}


def meta_host(name: str) -> nn.Module:
    """The host without weights."""
    with torch.device("meta"):
        return HOSTS[name].build().eval()


def random_host(name: str, seed: int) -> nn.Module:
    """The host on the CPU in float32 with small random weights, built without a second copy in memory."""
    model = meta_host(name).to_empty(device="cpu")
    fill_(model, seed)
    return model.requires_grad_(False)
