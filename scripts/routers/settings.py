"""From flags to `gp.APTP`, to the fine-tuning's method, and to the point where costs are counted."""

from __future__ import annotations

import argparse
from typing import Any

import genprune as gp
from genprune.errors import GenpruneError
from genprune.methods.assignments import assigned
from genprune.model_source import ModelSource
from genprune.recover_run import default_method
from genprune.recovery import NormalizedDistillation

# flag -> field of gp.APTP, where they are given as they are
FIELDS = {
    "experts": "experts",
    "keep": "keep",
    "of": "of",
    "route_by": "route_by",
    "kinds": "kinds",
    "seed": "seed",
    "max_train_steps": "steps",
    "train_batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "lr_warmup_steps": "lr_warmup_steps",
    "max_grad_norm": "max_grad_norm",
    "adam_weight_decay": "weight_decay",
    "snr_gamma": "min_snr_gamma",
    "proportion_empty_prompts": "prompt_dropout",
    "num_inference_steps": "teacher_steps",
    "guidance_scale": "teacher_guidance",
}
BY_FLAG = (*(name for name in FIELDS if name == FIELDS[name]), "mixed_precision", "gradient_checkpointing")
# flag -> field of gp.NormalizedDistillation
FINETUNE_FIELDS = {
    "finetune_steps": "steps",
    "finetune_batch_size": "batch_size",
    "finetune_learning_rate": "learning_rate",
    "finetune_rank": "lora_rank",
}
_SHARED = ("samples", "teacher_steps", "teacher_guidance", "seed", "mixed_precision", "gradient_checkpointing")


def aptp_of(args: argparse.Namespace) -> gp.APTP:
    """The defaults with every flag that was given on top. Raises `GenpruneError`."""
    given: dict[str, Any] = {
        field: getattr(args, flag) for flag, field in FIELDS.items() if getattr(args, flag) is not None
    }
    given |= {"mixed_precision": args.mixed_precision, "gradient_checkpointing": args.gradient_checkpointing}
    return gp.APTP().changed(**given | assigned(gp.APTP(), args.set or (), flags=BY_FLAG))


def finetuning_of(args: argparse.Namespace, source: ModelSource, settings: gp.APTP) -> NormalizedDistillation | None:
    """How the experts are fine-tuned; None where they are not. Raises `GenpruneError`.

    Latents are drawn once for the router and its experts, so that what they are drawn by is the router's.
    """
    given = {name for name in vars(args) if name.startswith("finetune_") and getattr(args, name) is not None}
    if args.finetune_steps is None:
        if given:
            raise GenpruneError(
                f"--{sorted(given)[0]} without --finetune_steps; expected the optimiser steps of all experts "
                "together. Pass --finetune_steps 1000, say."
            )
        return None
    values = {field: getattr(args, flag) for flag, field in FINETUNE_FIELDS.items() if flag in given}
    shared = {name: getattr(settings, name) for name in _SHARED}
    flags = ("steps", "lora_rank", *_SHARED)
    values |= assigned(default_method(source), args.finetune_set or (), flags=flags)
    return default_method(source, **values | shared)


def operating_point_of(args: argparse.Namespace, pipe: Any) -> dict[str, int] | None:
    """Height and width in latent pixels, where --resolution gives them."""
    if args.resolution is None:
        return None
    side = args.resolution // getattr(pipe, "vae_scale_factor", 1)
    return {"height": side, "width": side}
