"""Pruned classes of diffusers' models, and how pruned models are saved and loaded."""

from __future__ import annotations

from torch import nn


def adopt_(model: nn.Module) -> None:
    """Turn a model that was just cut into its Pruned class, in place."""
