#!/usr/bin/env python
"""Recover a pruned pipeline: train it against the dense one by normalised distillation.

    accelerate launch scripts/distill.py --pretrained_model_name_or_path small --teacher_model_name_or_path BASE \\
        --train_data_dir captioned --resolution 512 --max_train_steps 10000 --mixed_precision bf16 --output_dir out

Data are a hub data set or a folder of captioned pictures, or a file of prompts that the teacher draws; `miniature` as
the teacher needs neither. Every process takes rows of its own, and the number of processes multiplies the batch. The
output folder gets checkpoints, `curve.jsonl`, `validation/`, `pipeline/` (or `pytorch_lora_weights.safetensors` with
--rank), and `result.json`. On a CPU start several processes with `torchrun --nproc_per_node 2 scripts/distill.py ...`:
accelerate's own launcher needs MPI there.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402

import genprune as gp  # noqa: E402
from genprune import console  # noqa: E402
from genprune.errors import GenpruneError  # noqa: E402
from genprune.model_source import open_source  # noqa: E402
from genprune.recover_run import check_pair  # noqa: E402
from genprune.recovery.distillation import NORMALIZERS  # noqa: E402
from genprune.recovery.pairing import PAIRINGS  # noqa: E402
from scripts.distillation import data as training_data  # noqa: E402
from scripts.distillation import outputs, settings  # noqa: E402
from scripts.distillation.validation import ValidationPictures  # noqa: E402
from scripts.masks.outputs import DTYPES, check_output  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="the pruned pipeline's folder or hub id")
    add("--teacher_model_name_or_path", required=True, help="the dense pipeline: folder, hub id or 'miniature'")
    add("--output_dir", required=True, type=Path)
    add("--plan", type=Path, help="the pruning plan, where the student is a stock export with renumbered blocks")
    add("--set", action="append", metavar="NAME=VALUE", help="any other field of gp.NormalizedDistillation")
    add("--seed", type=int)

    data = parser.add_argument_group("data").add_argument
    data("--dataset_name", help="hub id of a data set of captioned pictures")
    data("--train_data_dir", type=Path, help="folder in the imagefolder layout, with metadata.jsonl")
    data("--image_column", default="image")
    data("--caption_column", default="text")
    data("--prompts", type=Path, help="a text file, one prompt a line; the teacher draws a picture for each, once")
    data("--max_train_samples", type=int, help="pictures, which are held in memory [all; 2048 of the miniature]")
    data("--resolution", type=int, help="side in px [the pipeline's own]")
    data("--proportion_empty_prompts", type=float, help="share of rows without their prompt, for guidance")

    loss = parser.add_argument_group("loss").add_argument
    loss("--task_weight", type=float, help="of the error to the data")
    loss("--output_weight", type=float, help="of the error to the teacher's output")
    loss("--feature_weight", type=float, help="of the errors of features")
    loss("--normalizer", choices=NORMALIZERS, help="the scale of each feature's error [rel_l2]")
    loss("--learned_weights", action="store_true", help="also learn a weight for every term")
    loss("--pairing", choices=PAIRINGS, help="the teacher's feature beside blocks that went [end_of_run]")
    loss("--snr_gamma", type=float, help="min-SNR weights of timesteps; 5 is usual, not for flow matching")

    train = parser.add_argument_group("training").add_argument
    train("--max_train_steps", type=int, help="optimiser steps")
    train("--train_batch_size", type=int, help="rows of a micro-batch and process")
    train("--gradient_accumulation_steps", type=int, help="micro-batches of an optimiser step")
    train("--learning_rate", type=float)
    train("--lr_scheduler", choices=tuple(settings.SCHEDULERS))
    train("--lr_warmup_steps", type=int)
    train("--max_grad_norm", type=float)
    train("--adam_beta1", type=float)
    train("--adam_beta2", type=float)
    train("--adam_weight_decay", type=float)
    train("--use_ema", action="store_true", help="average the weights; the run ends with the average")
    train("--ema_decay", type=float, help=f"[{settings.EMA_DECAY}]")
    train("--rank", type=int, help="train a LoRA of this rank and nothing else")
    train("--checkpointing_steps", type=int, default=500)
    train("--checkpoints_total_limit", type=int, default=2)
    train("--resume_from_checkpoint", choices=("latest",), help="go on from the newest checkpoint in --output_dir")

    draw = parser.add_argument_group("drawing, by the teacher and for validation").add_argument
    draw("--num_inference_steps", type=int, help="denoising steps a picture")
    draw("--guidance_scale", type=float)
    draw("--true_cfg_scale", type=float, help="of pipelines that have it beside an embedded guidance scale")
    draw("--negative_prompt")
    draw("--max_sequence_length", type=int, help="text tokens, of pipelines that take it")
    draw("--validation_prompts", nargs="+", help="draw these along the run, the dense pipeline's beside them")
    draw("--num_validation_images", type=int, default=1, help="of each prompt")
    draw("--validation_steps", type=int, default=500, help="optimiser steps between two looks")

    memory = parser.add_argument_group("memory and hardware").add_argument
    memory("--mixed_precision", choices=tuple(DTYPES), default="no", help="of activations, and of frozen weights")
    memory("--gradient_checkpointing", action="store_true")
    memory("--report_to", help="a tracker of accelerate, such as tensorboard or wandb")
    memory("--cpu", action="store_true", help="run on the CPU even where there is an accelerator")
    return parser.parse_args(arguments)


def distill(args: argparse.Namespace) -> Path | None:
    """Train and write; the result's path on the first process. Raises `GenpruneError`."""
    resume = args.resume_from_checkpoint is not None
    check_output(args.output_dir, resume)
    training_data.check_sources(args)
    sources = (open_source(args.pretrained_model_name_or_path), open_source(args.teacher_model_name_or_path))
    check_pair(*sources)
    teacher_source = sources[1]
    method = settings.method_of(args, teacher_source)
    plan = None if args.plan is None else gp.PruningPlan.load(args.plan)
    accelerator = make_accelerator(args)
    try:
        logging.getLogger().setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
        console.quiet_hosts()
        student_dtype, teacher_dtype = outputs.dtypes(args)
        teacher = teacher_source.load(accelerator.device, teacher_dtype)
        pictures = training_data.has_pictures(args, teacher_source)
        options = settings.options_of(args, teacher_source, pictures)
        settings.check_resolution(args, teacher)
        data = training_data.read_data(args, teacher_source, method, teacher, accelerator.num_processes)
        if args.report_to:
            accelerator.init_trackers("genprune-distill", config=_plain(method.to_json()))
        looks = _validation(args, teacher, method, options, accelerator)
        student = sources[0].load(accelerator.device, student_dtype)
        result = gp.recover(
            student,
            teacher,
            method,
            prompts=data.prompts,
            data=data.pictures,
            plan=plan,
            output_dir=args.output_dir,
            resume=resume,
            checkpointing_steps=args.checkpointing_steps,
            checkpoints_total_limit=args.checkpoints_total_limit,
            validation=looks,
            validation_steps=args.validation_steps if looks else None,
            pipeline_options=options,
            accelerator=accelerator,
        )
        if not accelerator.is_main_process:
            return None
        device, processes = accelerator.device, accelerator.num_processes
        return outputs.write_outputs(args, sources, student, method, data, result, options, device, processes)
    finally:
        accelerator.end_training()


def make_accelerator(args: argparse.Namespace) -> Any:
    """Joins the process group of the launcher, if there is one. Raises `GenpruneError`."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.tracking import get_available_trackers

    available = [str(name) for name in get_available_trackers()]
    if args.report_to and args.report_to not in (*available, "all"):
        raise GenpruneError(
            f"--report_to {args.report_to} is not installed; here are {', '.join(available) or 'none'}. Install it "
            f"with `pip install {args.report_to}`, or leave the flag out: curve.jsonl has every number."
        )
    # what a cut left of a host may have parameters that an output does not read
    spread = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    try:
        return Accelerator(
            mixed_precision=args.mixed_precision,
            cpu=args.cpu or not torch.accelerator.is_available(),
            log_with=args.report_to,
            project_dir=args.output_dir,
            kwargs_handlers=[spread],
        )
    except ValueError as error:
        raise GenpruneError(
            f"accelerate refuses --mixed_precision {args.mixed_precision} here ({error}); expected a precision that "
            "this device can run. Pass --mixed_precision no."
        ) from None


def _validation(
    args: argparse.Namespace, teacher: Any, method: Any, options: dict, accelerator: Any
) -> ValidationPictures | None:
    if not args.validation_prompts:
        return None
    given = dict(options)
    if method.teacher_guidance is not None:
        given["guidance_scale"] = method.teacher_guidance
    if args.resolution is not None:
        given |= {"height": args.resolution, "width": args.resolution}
    folder = args.output_dir / "validation"
    images, steps, seed = args.num_validation_images, method.teacher_steps, method.seed
    return ValidationPictures(
        teacher, args.validation_prompts, images, steps, given, folder, seed, accelerator.trackers
    )


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if isinstance(value, (int, float, str))}


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        result = distill(args)
    except (GenpruneError, ModuleNotFoundError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if result is not None:  # the first process
        print(
            f"recovered: {result.parent / outputs.PIPELINE if args.rank is None else result.parent}; result: {result}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
