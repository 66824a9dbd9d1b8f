"""Peak signal-to-noise ratio between a picture and its counterpart from another model."""

from __future__ import annotations

import torch
from torch import Tensor

from genprune.metrics.images import check_pair, to_unit_floats

CEILING_DB = 100.0


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """`10 log10(1 / MSE)` of each pair in dB, shape `(B,)`, float64; higher is closer.

    Scores end at `CEILING_DB` (100 dB), where identical pictures stand, instead of infinity: so means and intervals
    exist. At 100 dB a 64 px picture has lost nothing (one level in one channel of one pixel is 89 dB).

    Args:
        x, y: shape `(B, 3, H, W)`, `uint8` or floats in [0, 1]; row i of x belongs to row i of y.

    Raises:
        BadImages: the shapes differ, or a batch is no image batch.
    """
    check_pair(x, y)
    mse = (to_unit_floats(x).double() - to_unit_floats(y).double()).square().mean(dim=(1, 2, 3))
    return (-10 * torch.log10(mse)).clamp(max=CEILING_DB)
