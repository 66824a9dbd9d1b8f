#!/usr/bin/env python
"""Train a router and its experts on a text-to-image pipeline (APTP), and fine-tune the experts where asked.

    accelerate launch scripts/train_router.py --pretrained_model_name_or_path BASE --train_data_dir captioned \\
        --experts 8 --keep 0.7 --resolution 512 --encoder sentence-transformers/all-mpnet-base-v2 \\
        --mixed_precision bf16 --finetune_steps 20000 --save_pipeline --output_dir routed-base

Data are a hub data set or a folder of captioned pictures, or a file of prompts that the pipeline draws; `miniature` as
the base needs neither. Every process takes rows of its own, and the number of processes multiplies the batch. The
output folder gets checkpoints, `curve.json`, `router/`, `experts/` of a fine-tuning, `routed/` with --save_pipeline,
and `result.json`. On a CPU start several processes with `torchrun --nproc_per_node 2 scripts/train_router.py ...`:
accelerate's own launcher needs MPI there.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402

import genprune as gp  # noqa: E402
from genprune import console  # noqa: E402
from genprune.errors import GenpruneError  # noqa: E402
from genprune.model_source import open_source  # noqa: E402
from genprune.recovery import NormalizedDistillation  # noqa: E402
from scripts import distill  # noqa: E402
from scripts.distillation import data as training_data  # noqa: E402
from scripts.distillation.settings import check_resolution, options_of  # noqa: E402
from scripts.masks.outputs import DTYPES, check_output, check_pipeline  # noqa: E402
from scripts.routers import outputs, settings, starting  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="the dense pipeline: folder, hub id or 'miniature'")
    add("--output_dir", required=True, type=Path)
    add("--experts", type=int, metavar="K", help="how many [8]")
    add("--keep", type=float, help="share that stays on average over the training prompts [0.7]")
    add("--of", choices=("macs", "params", "latency"), help="what --keep is a share of [macs]; latency is measured")
    add("--route_by", choices=("prompt", "timestep"), help="what chooses an expert [prompt]")
    add("--kinds", nargs="+", help="kinds of sites that narrow [all that the model has]")
    add("--encoder", help="sentence-transformers folder or hub id [the pipeline's own pooled text embedding]")
    add("--scores", type=Path, help="what codes begin around: logits.safetensors of train_masks.py, or a plan")
    add("--set", action="append", metavar="NAME=VALUE", help="any other field of gp.APTP, repeatable")
    add("--seed", type=int)

    data = parser.add_argument_group("data").add_argument
    data("--dataset_name", help="hub id of a data set of captioned pictures")
    data("--train_data_dir", type=Path, help="folder in the imagefolder layout, with metadata.jsonl")
    data("--image_column", default="image")
    data("--caption_column", default="text")
    data("--prompts", type=Path, help="a text file, one prompt a line; the pipeline draws a picture for each, once")
    data("--max_train_samples", type=int, help="pictures, which are held in memory [all; 2048 of the miniature]")
    data("--resolution", type=int, help="side in px, which costs are counted at too [the pipeline's own]")
    data("--proportion_empty_prompts", type=float, help="share of rows without their prompt, for guidance")

    train = parser.add_argument_group("training").add_argument
    train("--max_train_steps", type=int, help="optimiser steps")
    train("--train_batch_size", type=int, help="rows of a step and process")
    train("--learning_rate", type=float)
    train("--lr_warmup_steps", type=int)
    train("--max_grad_norm", type=float)
    train("--adam_weight_decay", type=float)
    train("--snr_gamma", type=float, help="min-SNR weights of timesteps, not for flow matching")
    train("--checkpointing_steps", type=int, default=250)
    train("--resume_from_checkpoint", choices=("latest",), help="go on from the newest checkpoint in --output_dir")

    tune = parser.add_argument_group("fine-tuning of the experts").add_argument
    tune("--finetune_steps", type=int, help="optimiser steps of all experts together [no fine-tuning]")
    tune("--finetune_batch_size", type=int, help="rows of a step and process")
    tune("--finetune_learning_rate", type=float)
    tune("--finetune_rank", type=int, help="train a LoRA of this rank for each expert [all weights]")
    tune("--finetune_split", choices=("usage", "equal"), help="how steps are shared out [usage]")
    tune("--finetune_set", action="append", metavar="NAME=VALUE", help="a field of gp.NormalizedDistillation")

    draw = parser.add_argument_group("drawing").add_argument
    draw("--num_inference_steps", type=int, help="denoising steps a picture")
    draw("--guidance_scale", type=float)
    draw("--true_cfg_scale", type=float, help="of pipelines that have it beside an embedded guidance scale")
    draw("--negative_prompt")
    draw("--max_sequence_length", type=int, help="text tokens, of pipelines that take it")

    memory = parser.add_argument_group("memory, hardware and output").add_argument
    memory("--mixed_precision", choices=tuple(DTYPES), default="no", help="of activations, and of frozen weights")
    memory("--gradient_checkpointing", action="store_true")
    memory("--report_to", help="a tracker of accelerate, such as tensorboard or wandb")
    memory("--cpu", action="store_true", help="run on the CPU even where there is an accelerator")
    memory("--save_pipeline", action="store_true", help="also write the routed pipeline, base included")
    memory("--store", choices=("reordered", "materialised"), default="reordered", help="of the routed pipeline")
    return parser.parse_args(arguments)


def train(args: argparse.Namespace) -> Path | None:
    """Train, fine-tune and write; the result's path on the first process. Raises `GenpruneError`."""
    check_output(args.output_dir, args.resume_from_checkpoint is not None)
    training_data.check_sources(args)
    method = settings.aptp_of(args)
    source = open_source(args.pretrained_model_name_or_path)
    check_pipeline(source)
    finetuning = settings.finetuning_of(args, source, method)
    accelerator = distill.make_accelerator(args)
    try:
        logging.getLogger().setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
        console.quiet_hosts()
        pipe = source.load(accelerator.device, _dtype(args, finetuning))
        check_resolution(args, pipe)
        rows = NormalizedDistillation(steps=method.steps, batch_size=method.batch_size, seed=method.seed)
        data = training_data.read_data(args, source, rows, pipe, accelerator.num_processes)
        options = options_of(args, source, training_data.has_pictures(args, source))
        if args.report_to:
            plain = {name: value for name, value in method.to_json().items() if isinstance(value, (int, float, str))}
            accelerator.init_trackers("genprune-router", config=plain)
        router, seconds = _trained(args, pipe, method, finetuning, data, options, accelerator)
        if not accelerator.is_main_process:
            return None
        device, processes = accelerator.device, accelerator.num_processes
        told = (source, pipe, router, method, finetuning, data, options, seconds, device, processes)
        return outputs.write_outputs(args, *told)
    finally:
        accelerator.end_training()


def _dtype(args: argparse.Namespace, finetuning: NormalizedDistillation | None) -> torch.dtype:
    """Of the frozen pipeline: experts are cut from it, and what is trained as a whole is float32."""
    whole = finetuning is not None and finetuning.lora_rank is None
    return torch.float32 if whole else DTYPES[args.mixed_precision]


def _trained(
    args: argparse.Namespace,
    pipe: Any,
    method: gp.APTP,
    finetuning: NormalizedDistillation | None,
    data: Any,
    options: dict[str, Any],
    accelerator: Any,
) -> tuple[Any, dict[str, float]]:
    """The router, fine-tuned where that is asked for, and the seconds of both parts."""
    point = settings.operating_point_of(args, pipe)
    shared = {
        "prompts": data.prompts,
        "data": data.pictures,
        "pipeline_options": options,
        "resume": args.resume_from_checkpoint is not None,
        "checkpointing_steps": args.checkpointing_steps,
        "accelerator": accelerator,
    }
    began = time.perf_counter()
    router = gp.train_router(
        pipe,
        method,
        scores=starting.read_scores(args.scores, pipe, point),
        encoder=args.encoder,
        operating_point=point,
        output_dir=args.output_dir,
        **shared,
    )
    seconds = {"router": time.perf_counter() - began}
    if finetuning is not None:
        began = time.perf_counter()
        router = gp.finetune_experts(
            pipe,
            router,
            finetuning,
            output_dir=args.output_dir / outputs.EXPERTS,
            latents_dir=args.output_dir / "teacher_data",
            split=args.finetune_split or "usage",
            **shared,
        )
        seconds["finetuning"] = time.perf_counter() - began
    return router, seconds


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        result = train(args)
    except (GenpruneError, ModuleNotFoundError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if result is not None:  # the first process
        written = outputs.ROUTED if args.save_pipeline else outputs.ROUTER
        print(f"{'routed pipeline' if args.save_pipeline else 'router'}: {result.parent / written}; result: {result}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
