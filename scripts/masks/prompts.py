"""What masks are learned on: captions, a file of prompts, class labels, or the miniature's own prompts."""

from __future__ import annotations

import argparse
from typing import Any

from genprune.denoising.capture import takes_prompts
from genprune.errors import BadCalibrationData, GenpruneError
from genprune.metrics.errors import need
from genprune.model_source import MINIATURE, ModelSource
from genprune.prune_run import prompt_lines

SOURCES = ("prompts_file", "dataset_name", "train_data_dir", "class_labels")
SAMPLES = 100  # of a data set or the miniature: as many as the paper learns on


def read_prompts(args: argparse.Namespace, source: ModelSource) -> list | None:
    """Prompts or class labels by the flags; None where nothing is given. Raises `GenpruneError`."""
    given = [name for name in SOURCES if getattr(args, name)]
    if len(given) > 1:
        raise GenpruneError(f"--{' and --'.join(given)} are {len(given)} sources; expected one. Leave the others out.")
    if args.max_train_samples is not None and args.max_train_samples < 1:
        raise GenpruneError(f"--max_train_samples {args.max_train_samples}; expected at least 1. Pass 100, say.")
    if args.class_labels:
        return args.class_labels[: args.max_train_samples]
    if args.prompts_file:
        return prompt_lines(args.prompts_file, "--prompts_file")[: args.max_train_samples]
    if given:
        return _captions(args)
    if source.is_miniature:
        import genprune as gp

        return gp.miniature.prompts("dev", args.max_train_samples or SAMPLES)
    return None


def check_prompts(prompts: list | None, pipe: Any) -> None:
    """Raises `BadCalibrationData` for a text-to-image pipeline without prompts."""
    if prompts is None and takes_prompts(pipe):
        raise BadCalibrationData(
            f"{type(pipe).__name__} draws from prompts and none are given; expected about {SAMPLES}, like those that "
            f"it will be used with. Pass --prompts_file, --dataset_name or --train_data_dir (only '{MINIATURE}' has "
            "prompts of its own)."
        )


def _captions(args: argparse.Namespace) -> list[str]:
    """Captions of a data set, in an order that the seed decides; its pictures are not read."""
    load = need("datasets", install="genprune[train]").load_dataset
    if args.dataset_name:
        rows = load(args.dataset_name, split=args.dataset_split)
    else:
        rows = load("imagefolder", data_dir=str(args.train_data_dir), split=args.dataset_split)
    if args.caption_column not in rows.column_names:
        raise GenpruneError(
            f"the data set has no column '{args.caption_column}', it has {', '.join(rows.column_names)}. Pass one of "
            "them as --caption_column."
        )
    rows = rows.select_columns([args.caption_column]).shuffle(seed=args.seed or 0)
    captions = rows[: args.max_train_samples or SAMPLES][args.caption_column]
    return [caption if isinstance(caption, str) else caption[0] for caption in captions]
