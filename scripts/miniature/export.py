"""Stage "export": the trained parts as a stock diffusers folder in float16, small enough to be embedded."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from genprune.miniature import grader as grader_module

from .assembly import assemble_pipeline, averaged_weights, distilled_weights

LIMIT = 20 * 2**20  # bytes of one miniature
FOLDERS = {"unet": "pipeline", "mmdit": "pipeline_mmdit"}
STUDENT = "transformer_4_step"


def export(arguments: argparse.Namespace) -> Path:
    """Write the pipeline of `--arch`, the grader's weights and a short training log into `--export_dir`.

    Older ones are replaced. A 4-step student is written beside its teacher, where there is one.

    Raises:
        FileNotFoundError: the autoencoder or the denoiser has not been trained.
        ValueError: no folder for this architecture, or it would be larger than the 20 MiB that may be embedded.
    """
    if arguments.arch not in FOLDERS:
        raise ValueError(f"--arch {arguments.arch} is not embedded; expected one of {', '.join(FOLDERS)}")
    target = arguments.export_dir or Path(grader_module.__file__).parent
    target.mkdir(parents=True, exist_ok=True)
    pipeline = assemble_pipeline(arguments.output_dir, arguments.arch, arguments.denoiser_weights)
    tokenizer = arguments.output_dir / arguments.arch / "tokenizer"
    folder = write_pipeline(pipeline.to(torch.float16), target / FOLDERS[arguments.arch], tokenizer)
    if any((arguments.output_dir / f"{arguments.arch}_4_step").glob("checkpoint-*[0-9]")):
        student = distilled_weights(arguments.output_dir, arguments.arch)
        pipeline = assemble_pipeline(arguments.output_dir, arguments.arch, arguments.denoiser_weights, student)
        shutil.rmtree(target / STUDENT, ignore_errors=True)
        pipeline.transformer.half().save_pretrained(target / STUDENT, max_shard_size="7MB")
    if any((arguments.output_dir / "grader").glob("checkpoint-*[0-9]")):
        weights = load_file(averaged_weights(arguments.output_dir / "grader"))
        halves = {name.removeprefix("grader."): tensor.half() for name, tensor in weights.items()}
        save_file(halves, target / grader_module.WEIGHTS)
    write_log(arguments.output_dir, target / "training_log.jsonl")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > LIMIT:
        raise ValueError(f"{folder} holds {size / 2**20:.1f} MiB, but at most 20 may be embedded; narrow a model")
    return folder


def write_pipeline(pipeline, folder: Path, tokenizer: Path) -> Path:
    """Save a float16 pipeline whole, readable by transformers 4 and 5; `tokenizer` holds its vocabulary files."""
    written = folder.with_name(f".{folder.name}-writing")
    shutil.rmtree(written, ignore_errors=True)
    pipeline.save_pretrained(written, max_shard_size="7MB")
    # transformers 5 writes tokenizer.json alone; version 4's CLIPTokenizer reads these two
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer / name, written / "tokenizer")
    # where no type is asked for, transformers loads in the recorded one and diffusers in float32; a half text encoder
    # in front of a float32 denoiser would crash, so the record says float32 (the file stays float16)
    for config in written.glob("text_encoder*/config.json"):
        config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    _name_text_weights_as_the_hub_does(written / "text_encoder" / "model.safetensors")
    shutil.rmtree(folder, ignore_errors=True)
    written.rename(folder)
    return folder


def _name_text_weights_as_the_hub_does(path: Path) -> None:
    # transformers 5 dropped the prefix from its names but reads both; version 4 reads the prefixed ones alone, and
    # would start from random weights with no more than a warning
    tensors = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def write_log(output_dir: Path, path: Path, lines_per_stage: int = 25) -> None:
    """A thinned training log of all stages, one JSON object a line."""
    with path.open("w") as file:
        for log in sorted(output_dir.glob("*/log.jsonl")):
            records = {record["step"]: record for record in map(json.loads, log.read_text().splitlines())}
            steps = sorted(records)
            every = max(1, len(steps) // lines_per_stage)
            kept = [step for index, step in enumerate(steps) if index % every == 0 or step == steps[-1]]
            for step in kept:
                file.write(json.dumps({"stage": log.parent.name, **records[step]}) + "\n")
