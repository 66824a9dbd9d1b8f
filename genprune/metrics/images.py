"""What counts as a batch of images, and how one is resized before a network sees it.

Every extractor and every paired score goes through `to_uint8`, so that a `uint8` batch and the same batch as floats
in [0, 1] give the same number bit for bit. torchmetrics leaves this to a custom extractor and, given one, ignores its
own `normalize` flag.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from genprune.metrics.errors import BadImages


def to_uint8(images: Tensor) -> Tensor:
    """The batch as 8-bit RGB, the form in which a picture is stored and seen.

    Args:
        images: shape `(B, 3, H, W)`; `uint8`, or floating point in [0, 1] (rounded to the nearest of 256 levels).

    Returns:
        `uint8` tensor of the same shape.

    Raises:
        BadImages: another shape or dtype, values outside [0, 1] (such as [-1, 1] or [0, 255] floats), or NaN.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise BadImages(
            f"images have shape {tuple(images.shape)}, expected (batch, 3, height, width). "
            "Add a batch dimension, or convert to RGB with image.convert('RGB')."
        )
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise BadImages(f"images have dtype {images.dtype}, expected uint8 or floats in [0, 1]. Use images.byte().")
    if images.numel():
        low, high = images.min().item(), images.max().item()
        if not (0.0 <= low and high <= 1.0):  # written so that NaN is refused too
            raise BadImages(
                f"float images reach from {low:.4g} to {high:.4g}, expected [0, 1]. "
                "Use (images + 1) / 2 for [-1, 1], images / 255 for [0, 255], or .clamp(0, 1) for rounding overshoot."
            )
    return (images.float() * 255).round().to(torch.uint8)


def to_unit_floats(images: Tensor) -> Tensor:
    """The batch as `float32` in [0, 1] after rounding to 8 bits; same arguments and errors as `to_uint8`."""
    return to_uint8(images).float() / 255


def resize(images: Tensor, size: int | tuple[int, int] | None) -> Tensor:
    """Bicubic, antialiased resize of floats; PIL's `Image.BICUBIC` filter, the recipe of clean-fid.

    Args:
        images: floats of shape `(B, 3, H, W)`.
        size: side in px of the square result, or `(height, width)`; None or the present size leaves the batch as is.

    Returns:
        Shape `(B, 3, size, size)`; values may overshoot [0, 1] by a little, as clean-fid's do.

    Reference:
        Parmar et al., On Aliased Resizing and Surprising Subtleties in GAN Evaluation, arXiv 2104.11222.
    """
    if size is None:
        return images
    target = (size, size) if isinstance(size, int) else tuple(size)
    if tuple(images.shape[-2:]) == target:
        return images
    return F.interpolate(images, size=target, mode="bicubic", antialias=True, align_corners=False)


def check_pair(x: Tensor, y: Tensor) -> None:
    """Raise `BadImages` unless both batches have one shape, so that row i of one belongs to row i of the other."""
    if x.shape != y.shape:
        raise BadImages(
            f"the paired batches have shapes {tuple(x.shape)} and {tuple(y.shape)}, expected the same. "
            "Draw both with the same prompts, seeds, height and width."
        )
