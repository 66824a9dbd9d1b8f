"""The embedded miniatures as bases of a comparison: how each is loaded, sampled, decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from genprune import miniature
from genprune.denoising.trajectory import draw_latents
from genprune.families import OperatingPoint, denoiser

DRAW_ROWS = 32  # pictures drawn together


@dataclass(frozen=True)
class Base:
    """A dense pipeline that candidates are pruned from.

    Args:
        name: in tables and file names.
        load: the pipeline, float32.
        steps: of its sampler, in scoring, in learning and in judging.
        learn_steps: of the chain that masks are learned through.
        options: keyword arguments of the pipeline's call, guidance included.
        point: where MACs are counted: 64 px and the caption's own length.
    """

    name: str
    load: Callable[[], Any] = field(repr=False)
    steps: int = 20
    learn_steps: int = 10
    options: Mapping[str, Any] = field(default_factory=dict)
    point: Mapping[str, int] = field(default_factory=dict)


def bases() -> dict[str, Base]:
    """The miniatures by name."""
    flux = {"height": 64, "width": 64, "max_sequence_length": 16}
    guided = flux | {"true_cfg_scale": 3.5, "negative_prompt": ""}
    size = {"height": 16, "width": 16, "text_length": 16}
    return {
        "unet": Base("unet", miniature.load_pipeline, options={"guidance_scale": 3.5}, point=size),
        "mmdit": Base("mmdit", lambda: miniature.load_pipeline("mmdit"), options=guided, point=size),
        "mmdit-4-step": Base(
            "mmdit-4-step", lambda: miniature.load_pipeline("mmdit-4-step"), 4, 4, options=flux, point=size
        ),
    }


@torch.no_grad()
def latents_of(pipe, base: Base, prompts: list[str], first_seed: int, steps: int | None = None) -> Tensor:
    """Final latents `(n, ...)`; the noise of prompt i is seeded by `first_seed + i`."""
    options = {**base.options, "num_inference_steps": steps or base.steps}
    parts = []
    for start in range(0, len(prompts), DRAW_ROWS):
        chosen = prompts[start : start + DRAW_ROWS]
        seeds = range(first_seed + start, first_seed + start + len(chosen))
        parts.append(draw_latents(pipe, chosen, seeds=tuple(seeds), **options))
    return torch.cat(parts)


@torch.no_grad()
def pictures_of(pipe, latents: Tensor) -> Tensor:
    """uint8 `(n, 3, 64, 64)` of final latents as `latents_of` gives them."""
    if latents.ndim == 3:
        latents = pipe._unpack_latents(latents, 64, 64, pipe.vae_scale_factor)
    shift = getattr(pipe.vae.config, "shift_factor", None) or 0.0
    decoded = [pipe.vae.decode(part / pipe.vae.config.scaling_factor + shift).sample for part in latents.split(64)]
    return ((torch.cat(decoded).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def operating_point(pipe, base: Base) -> OperatingPoint:
    """The base's operating point, checked by its family."""
    from genprune.costs import operating_point as of

    return of(denoiser(pipe), **base.point)
