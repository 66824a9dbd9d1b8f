#!/usr/bin/env python
"""Learn EcoDiff's masks on a text-to-image pipeline, and write a pruning plan for every budget asked for.

    accelerate launch scripts/train_masks.py --pretrained_model_name_or_path BASE --recipe sdxl \\
        --prompts_file prompts.txt --keep 0.8 --of params --mixed_precision bf16 --output_dir masks

`miniature` as the base needs nothing else: it is embedded and has prompts of its own. Every process takes prompts of
its own, and the number of processes multiplies the batch. The output folder gets checkpoints, `logits.safetensors`,
`curve.json`, `plan-KEEP` for each --keep, `pipeline-KEEP` with --save_pipeline, and `result.json`. On a CPU start
several processes with `torchrun --nproc_per_node 2 scripts/train_masks.py ...`: accelerate's own launcher needs MPI
there.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import genprune as gp  # noqa: E402
from genprune import console  # noqa: E402
from genprune.errors import GenpruneError  # noqa: E402
from genprune.model_source import open_source  # noqa: E402
from scripts.masks import outputs, settings  # noqa: E402
from scripts.masks.processes import load_on, process_state  # noqa: E402
from scripts.masks.prompts import check_prompts, read_prompts  # noqa: E402

logger = logging.getLogger("train_masks")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="a pipeline's folder or hub id, or 'miniature'")
    add("--output_dir", required=True, type=Path)
    add("--keep", type=float, action="append", help="share that stays, repeatable; trained for the first [0.8]")
    add("--of", choices=("params", "macs", "units"), help="what --keep is a share of [params]")
    add("--kinds", nargs="+", help="kinds of sites that may go [those that narrow layers]")
    add("--recipe", help=f"settings to start from: {', '.join(gp.EcoDiff.recipes())}; flags go on top")
    add("--set", action="append", metavar="NAME=VALUE", help="any other field of gp.EcoDiff, repeatable")
    add("--seed", type=int)

    data = parser.add_argument_group("prompts").add_argument
    data("--prompts_file", type=Path, help="a text file, one prompt a line")
    data("--dataset_name", help="hub id of a data set with captions")
    data("--train_data_dir", type=Path, help="folder in the imagefolder layout, with metadata.jsonl")
    data("--dataset_split", default="train")
    data("--caption_column", default="text")
    data("--class_labels", nargs="+", type=int, help="of a class-conditional pipeline, instead of prompts")
    data("--max_train_samples", type=int, help="prompts [all of a file, 100 of a data set or the miniature]")

    train = parser.add_argument_group("training").add_argument
    train("--max_train_steps", type=int, help="optimiser steps")
    train("--train_batch_size", type=int, help="prompts of one trajectory and process")
    train("--gradient_accumulation_steps", type=int, help="trajectories of one optimiser step")
    train("--learning_rate", type=float, help="logits a step")
    train("--validation_steps", type=int, help="optimiser steps between two looks at the plan; 0: never")
    train("--checkpointing_steps", type=int, default=25)
    train("--resume_from_checkpoint", choices=("latest",), help="go on from the newest checkpoint in --output_dir")

    draw = parser.add_argument_group("trajectories").add_argument
    draw("--num_inference_steps", type=int)
    draw("--guidance_scale", type=float, nargs="+", help="one number, or two for a range")
    draw("--true_cfg_scale", type=float, help="of pipelines that have it beside an embedded guidance scale")
    draw("--negative_prompt")
    draw("--height", type=int, help="px [the pipeline's own]")
    draw("--width", type=int, help="px [the pipeline's own]")
    draw("--max_sequence_length", type=int, help="text tokens, of pipelines that take it")

    memory = parser.add_argument_group("memory and hardware").add_argument
    memory("--mixed_precision", choices=tuple(outputs.DTYPES), default="no", help="type of the frozen pipeline")
    memory("--gradient_checkpointing", action="store_true", help="recompute block by block inside a call as well")
    memory("--activation_memory", help="for the graphs of calls: a size such as 8GiB, 'one call' or 'none' (all)")
    memory("--cpu", action="store_true", help="run on the CPU even where there is an accelerator")
    memory("--save_pipeline", action="store_true", help="also cut the pipeline by each plan and save it")
    args = parser.parse_args(arguments)
    args.keep = args.keep or [0.8]
    return args


def train(args: argparse.Namespace) -> Path | None:
    """Learn and write; the result's path on the first process. Raises `GenpruneError`."""
    resume = args.resume_from_checkpoint is not None
    method, options = settings.method_of(args), settings.options_of(args)
    outputs.check_output(args.output_dir, resume)
    source = open_source(args.pretrained_model_name_or_path)
    outputs.check_pipeline(source)
    prompts = read_prompts(args, source)
    state = process_state(args.cpu)
    logging.getLogger().setLevel(logging.INFO if state.is_main_process else logging.ERROR)
    if args.mixed_precision == "fp16":
        logger.warning("fp16 overflows in long chains, which ends a run; use bf16 where the hardware has it")
    console.quiet_hosts()
    pipe = load_on(source, state, outputs.DTYPES[args.mixed_precision])
    check_prompts(prompts, pipe)
    point = settings.operating_point_of(args, pipe)
    outputs.check_reachable(pipe, method, args.keep, point)
    began = time.perf_counter()
    scores = gp.score(
        pipe,
        method,
        prompts=prompts,
        operating_point=point,
        pipeline_options=options,
        output_dir=args.output_dir,
        resume=resume,
        checkpointing_steps=args.checkpointing_steps,
    )
    seconds = time.perf_counter() - began
    processes = state.num_processes
    state.destroy_process_group()  # nothing is exchanged from here on, and writing may take long
    if not state.is_main_process:
        return None
    del pipe
    return outputs.write_outputs(args, source, scores, options, state.device, processes, seconds)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        result = train(args)
    except (GenpruneError, ModuleNotFoundError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if result is not None:  # the first process
        print(f"plans: {', '.join(f'{result.parent}/plan-{keep:g}' for keep in args.keep)}; result: {result}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
