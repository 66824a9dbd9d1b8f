"""What is trained on: captioned pictures, prompts that the teacher draws, or the miniature's train scenes."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from genprune.denoising.capture import takes_prompts
from genprune.errors import GenpruneError
from genprune.model_source import ModelSource
from genprune.prune_run import prompt_lines
from genprune.recover_run import PICTURES, RecoveryData, check_data, miniature_data
from genprune.recovery import NormalizedDistillation
from scripts.distillation.settings import pixels_of

SOURCES = ("dataset_name", "train_data_dir", "prompts")


def check_sources(args: argparse.Namespace) -> None:
    """Raises `GenpruneError` for flags that contradict each other: before anything is loaded."""
    given = [name for name in SOURCES if getattr(args, name)]
    if len(given) > 1:
        raise GenpruneError(f"--{' and --'.join(given)} are {len(given)} sources; expected one. Leave the others out.")
    if args.max_train_samples is not None and args.max_train_samples < 1:
        raise GenpruneError(f"--max_train_samples {args.max_train_samples}; expected at least 1. Pass 1000, say.")


def has_pictures(args: argparse.Namespace, teacher: ModelSource) -> bool:
    """Whether the data bring pictures, so that the teacher need not draw."""
    return bool(args.dataset_name or args.train_data_dir or (teacher.is_miniature and not args.prompts))


def read_data(
    args: argparse.Namespace, teacher: ModelSource, method: NormalizedDistillation, pipe: Any, processes: int = 1
) -> RecoveryData:
    """The data by the flags.

    Args:
        pipe: the teacher's, whose size pictures of a data set are scaled and centre-cropped to.

    Raises:
        GenpruneError: they cannot be read, or a text-to-image pipeline gets none.
    """
    count = args.max_train_samples
    if args.prompts:
        return RecoveryData(prompt_lines(args.prompts)[:count], name=f"{args.prompts.name}, drawn by the teacher")
    if args.dataset_name or args.train_data_dir:
        return _captioned(args, pipe)
    if teacher.is_miniature:
        rows = method.steps * method.batch_size * method.gradient_accumulation * processes
        return miniature_data(count or min(PICTURES, rows), method.seed)
    data = RecoveryData()
    check_data(data, pipe, "--prompts FILE, --dataset_name or --train_data_dir")
    return data


def _captioned(args: argparse.Namespace, pipe: Any) -> RecoveryData:
    from scripts.miniature.data import CaptionedImages

    captioned, side = takes_prompts(pipe), args.resolution or pixels_of(pipe)
    column = args.caption_column if captioned else args.image_column  # there may be no captions to read
    try:
        images = CaptionedImages(
            args.dataset_name, args.train_data_dir, args.image_column, column, side, args.max_train_samples
        )
    except (ValueError, OSError) as error:  # no such column, no such data set, nothing to reach it by
        raise GenpruneError(
            f"the data set cannot be read ({error}); expected pictures{' with captions' if captioned else ''}. Check "
            "--dataset_name or --train_data_dir, and the columns."
        ) from None
    pictures = torch.empty(images.count, 3, side, side)  # as the VAE takes them: no second copy in its preprocessing
    for index in range(images.count):
        pictures[index] = torch.from_numpy(images.picture(index).copy()).permute(2, 0, 1).float() / 255
    name = args.dataset_name or args.train_data_dir.name
    return RecoveryData(images.captions() if captioned else None, pictures, str(name))
