"""From flags to `gp.NormalizedDistillation` and to the arguments of the pipeline's call."""

from __future__ import annotations

import argparse
from typing import Any

from genprune.errors import GenpruneError
from genprune.families import denoiser
from genprune.methods.assignments import assigned
from genprune.model_source import ModelSource
from genprune.recover_run import default_method
from genprune.recovery import NormalizedDistillation

# flag -> field of gp.NormalizedDistillation, where they are given as they are
FIELDS = {
    "max_train_steps": "steps",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "learning_rate": "learning_rate",
    "lr_warmup_steps": "warmup_steps",
    "max_grad_norm": "max_grad_norm",
    "adam_weight_decay": "weight_decay",
    "snr_gamma": "min_snr_gamma",
    "proportion_empty_prompts": "prompt_dropout",
    "rank": "lora_rank",
    "normalizer": "normalizer",
    "task_weight": "task_weight",
    "output_weight": "output_weight",
    "feature_weight": "feature_weight",
    "pairing": "pairing",
    "num_inference_steps": "teacher_steps",
    "guidance_scale": "teacher_guidance",
    "seed": "seed",
}
# fields that `--set` leaves to their flags, by the flag's name
BY_FLAG = tuple(name for name in FIELDS if name == FIELDS[name])
SCHEDULERS = {"constant": "constant", "constant_with_warmup": "constant", "cosine": "cosine", "linear": "linear"}
EMA_DECAY = 0.9999  # of diffusers' scripts


def method_of(args: argparse.Namespace, teacher: ModelSource) -> NormalizedDistillation:
    """The defaults for this teacher, with every flag that was given on top. Raises `GenpruneError`."""
    given: dict[str, Any] = {
        field: getattr(args, flag) for flag, field in FIELDS.items() if getattr(args, flag) is not None
    }
    defaults = default_method(teacher)
    if args.lr_scheduler is not None:
        given["lr_scheduler"] = SCHEDULERS[args.lr_scheduler]
        if args.lr_scheduler == "constant_with_warmup" and not args.lr_warmup_steps:
            raise GenpruneError(
                "--lr_scheduler constant_with_warmup has no warm-up; expected its length. Pass --lr_warmup_steps 500."
            )
    if args.adam_beta1 is not None or args.adam_beta2 is not None:
        first, second = defaults.betas
        given["betas"] = (
            first if args.adam_beta1 is None else args.adam_beta1,
            second if args.adam_beta2 is None else args.adam_beta2,
        )
    if args.ema_decay is not None and not args.use_ema:
        raise GenpruneError(
            f"--ema_decay {args.ema_decay:g} without averaged weights; expected both or neither. Add --use_ema."
        )
    if args.use_ema:
        given["ema_decay"] = EMA_DECAY if args.ema_decay is None else args.ema_decay
    for flag in ("learned_weights", "gradient_checkpointing"):
        if getattr(args, flag):
            given[flag] = True
    given["mixed_precision"] = args.mixed_precision
    given |= assigned(defaults, args.set or (), flags=BY_FLAG)
    return default_method(teacher, **given)


def options_of(args: argparse.Namespace, teacher: ModelSource, pictures: bool) -> dict[str, Any]:
    """Keyword arguments of the pipeline's call; its size only where the teacher draws, pictures bring their own."""
    options = dict(teacher.call_options)
    for name in ("negative_prompt", "true_cfg_scale", "max_sequence_length"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    if args.resolution is not None and not pictures:
        options |= {"height": args.resolution, "width": args.resolution}
    return options


def check_resolution(args: argparse.Namespace, pipe: Any) -> None:
    """Raises `GenpruneError` for a size that the pipeline cannot draw."""
    factor = getattr(pipe, "vae_scale_factor", 1)
    if args.resolution is not None and (args.resolution < factor or args.resolution % factor):
        raise GenpruneError(
            f"--resolution {args.resolution} is no size that {type(pipe).__name__} can draw; expected a multiple of "
            f"{factor}. Pass --resolution {max(1, round(args.resolution / factor)) * factor}."
        )


def pixels_of(pipe: Any) -> int:
    """Side of the square that a pipeline draws by default, in px. Raises `GenpruneError` where it does not say."""
    size = getattr(pipe, "default_sample_size", None) or getattr(denoiser(pipe).config, "sample_size", None)
    if size is None:
        raise GenpruneError(
            f"{type(pipe).__name__} does not say what size it draws; expected the side of its pictures in px. Pass "
            "--resolution 512, say."
        )
    return (size if isinstance(size, int) else size[0]) * getattr(pipe, "vae_scale_factor", 1)
