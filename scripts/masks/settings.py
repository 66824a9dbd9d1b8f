"""From flags to a method and to the arguments of the pipeline's call."""

from __future__ import annotations

import argparse
from typing import Any

import genprune as gp
from genprune.errors import GenpruneError
from genprune.methods.assignments import assigned

# flag -> field of gp.EcoDiff, where they are given as they are
FIELDS = {
    "of": "of",
    "seed": "seed",
    "kinds": "kinds",
    "max_train_steps": "train_steps",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "learning_rate": "learning_rate",
    "num_inference_steps": "denoising_steps",
    "validation_steps": "validate_every",
}
OPTIONS = ("negative_prompt", "max_sequence_length")
# fields that `--set` leaves to their flags, by the flag's name
BY_FLAG = ("keep", "of", "seed", "kinds", "learning_rate", "gradient_accumulation_steps", "guidance_scale")


def method_of(args: argparse.Namespace) -> gp.EcoDiff:
    """The recipe, or the defaults, with every flag that was given on top. Raises `GenpruneError`."""
    method = gp.EcoDiff.recipe(args.recipe) if args.recipe else gp.EcoDiff()
    given = {field: getattr(args, flag) for flag, field in FIELDS.items() if getattr(args, flag) is not None}
    if args.gradient_checkpointing:
        given["block_checkpointing"] = True
    if args.activation_memory is not None:
        given |= assigned(method, [f"activation_memory={args.activation_memory}"])
    if args.guidance_scale is not None:
        given["guidance_scale"] = _guidance(args.guidance_scale)
    given |= assigned(method, args.set or (), flags=BY_FLAG)
    method = method.changed(keep=args.keep[0], **given)
    # with a true guidance beside it, the guidance scale is a fixed condition and goes where the other options go
    return method.changed(guidance_scale=None) if args.true_cfg_scale is not None else method


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of the pipeline's call, without its size. Raises `GenpruneError`."""
    options = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    if args.true_cfg_scale is None:
        return options
    guidance = gp.EcoDiff.recipe(args.recipe).guidance_scale if args.recipe else None
    guidance = guidance if args.guidance_scale is None else _guidance(args.guidance_scale)
    if isinstance(guidance, tuple):
        raise GenpruneError(
            f"--guidance_scale is a range, {guidance}, and --true_cfg_scale is given; expected one number beside a "
            "true guidance. Pass --guidance_scale 3.5."
        )
    options["true_cfg_scale"] = args.true_cfg_scale
    return options if guidance is None else options | {"guidance_scale": guidance}


def operating_point_of(args: argparse.Namespace, pipe: Any) -> dict[str, int] | None:
    """Height and width in latent pixels, where the flags give some. Raises `GenpruneError`."""
    factor = getattr(pipe, "vae_scale_factor", 1)
    given = {name: getattr(args, name) for name in ("height", "width") if getattr(args, name) is not None}
    for name, pixels in given.items():
        if pixels < factor or pixels % factor:
            raise GenpruneError(
                f"--{name} {pixels} is no size that {type(pipe).__name__} can draw; expected a multiple of {factor}. "
                f"Pass --{name} {max(1, round(pixels / factor)) * factor}."
            )
    return {name: pixels // factor for name, pixels in given.items()} or None


def _guidance(values: list[float]) -> float | tuple[float, ...]:
    return values[0] if len(values) == 1 else tuple(values)
