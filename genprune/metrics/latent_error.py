"""Squared difference of final latents, which sees what two denoisers do before the decoder hides or adds anything."""

from __future__ import annotations

import torch
from torch import Tensor

from genprune.metrics.errors import BadImages
from genprune.metrics.images import check_pair


def latent_mse(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of each pair of latents, shape `(B,)`, float64, in the latents' own units squared.

    Args:
        x, y: any shape `(B, ...)`, the same for both; row i of x belongs to row i of y.

    Raises:
        BadImages: the shapes differ, there is nothing to average, or a value is not finite.
    """
    check_pair(x, y)
    if x.ndim < 2:
        raise BadImages(f"latents have shape {tuple(x.shape)}, expected (batch, ...). Add a batch dimension.")
    difference = (x.double() - y.double()).flatten(1).square().mean(1)
    if not torch.isfinite(difference).all():
        raise BadImages("the latents hold NaN or infinity, expected finite numbers. Draw in float32 or bfloat16.")
    return difference
