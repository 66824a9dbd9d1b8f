"""Clean latents from what a user has: latents as they are, images through the pipeline's VAE once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genprune.denoising.capture import Run
from genprune.errors import BadCalibrationData
from genprune.families import denoiser

_EXPECTED = "expected latents (n, C, h, w), images (n, 3, H, W) in [0, 1], or a list of PIL images"


def clean_latents(pipe, data: Any) -> tuple[Tensor, dict[str, int]]:
    """Latents as the denoiser sees them, unpacked, and the pipeline's `height` and `width` for them.

    Args:
        pipe: with a VAE, or without one (then images are the latents, scaled to [-1, 1]).
        data: latents `(n, C, h, w)` already scaled, images `(n, 3, H, W)` in [0, 1], or a list of PIL images.

    Raises:
        BadCalibrationData: no such data.
    """
    vae = getattr(pipe, "vae", None)
    if isinstance(data, Sequence) and data and all(isinstance(item, Tensor) for item in data):
        data = torch.stack(tuple(data))
    if isinstance(data, Tensor):
        if data.ndim != 4 or not len(data) or not data.is_floating_point():
            raise BadCalibrationData(f"data is {data.dtype} of shape {tuple(data.shape)}; {_EXPECTED}.")
        if vae is None:
            return data.float() * 2 - 1, {}
        if data.shape[1] == vae.config.latent_channels and data.shape[1] != vae.config.in_channels:
            factor = pipe.vae_scale_factor
            return data.float(), {"height": data.shape[2] * factor, "width": data.shape[3] * factor}
        if data.shape[1] != vae.config.in_channels or data.min() < 0 or data.max() > 1:
            raise BadCalibrationData(
                f"data has shape {tuple(data.shape)} and values from {float(data.min()):g} to {float(data.max()):g}; "
                f"{_EXPECTED}. The VAE has {vae.config.latent_channels} latent channels."
            )
    elif not isinstance(data, Sequence) or not data or not all(hasattr(item, "convert") for item in data):
        raise BadCalibrationData(f"data is {type(data).__name__}; {_EXPECTED}.")
    if vae is None:
        from diffusers.image_processor import VaeImageProcessor

        size = denoiser(pipe).config.sample_size
        return VaeImageProcessor(vae_scale_factor=1).preprocess(list(data), size, size).float(), {}
    return _encoded(pipe, data)


@torch.no_grad()
def _encoded(pipe, data: Any) -> tuple[Tensor, dict[str, int]]:
    vae = pipe.vae
    images = pipe.image_processor.preprocess(data if isinstance(data, Tensor) else list(data))  # (n, 3, H, W), [-1, 1]
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    latents = []
    for image in images.split(1):
        encoded = vae.encode(image.to(vae.device, vae.dtype)).latent_dist.mode()
        latents.append((encoded.float() - shift) * vae.config.scaling_factor)
    return torch.cat(latents).cpu(), {"height": images.shape[2], "width": images.shape[3]}


def packed(pipe, run: Run, latents: Tensor) -> Tensor:
    """Latents `(B, C, h, w)` in the layout that the denoiser takes: as they are, or packed `(B, h*w/4, C*4)`."""
    if run.latents.ndim == latents.ndim:
        return latents
    rows, channels, height, width = latents.shape
    return pipe._pack_latents(latents, rows, channels, height, width)
