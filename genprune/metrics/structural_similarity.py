"""Structural similarity between a picture and its counterpart from another model, as torchmetrics computes it."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from genprune.metrics.errors import BadImages
from genprune.metrics.images import check_pair, to_unit_floats

WINDOW = 11  # px, the Gaussian window of the paper


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of each pair, shape `(B,)`, float64, at most 1 for identical pictures; higher is closer.

    Averaged over the whole picture, mirrored at its border, as torchmetrics does. An empty canvas can beat a wrong
    picture in SSIM where backgrounds are plain: never report it alone.

    Args:
        x, y: shape `(B, 3, H, W)`, at least 11 px a side, `uint8` or floats in [0, 1]; row i belongs to row i.

    Raises:
        BadImages: the shapes differ, a batch is no image batch, or the pictures are smaller than the window.

    Reference:
        Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity, 2004 (sigma 1.5).
    """
    check_pair(x, y)
    if min(x.shape[-2:]) < WINDOW:
        raise BadImages(f"pictures are {tuple(x.shape[-2:])} px, expected at least {WINDOW} px a side for SSIM.")
    x, y = to_unit_floats(x).double(), to_unit_floats(y).double()
    return structural_similarity_index_measure(x, y, data_range=1.0, reduction="none", kernel_size=WINDOW).reshape(-1)
