"""Where the miniature's figures come from: data, training, versions, machine."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file

from genprune.miniature import grammar

from .assembly import averaged_weights


def describe_data(scenes: list[grammar.Scene]) -> dict:
    text = "\n".join(grammar.caption(scene) for scene in scenes)
    folder = Path(grammar.__file__).parent
    c, b, t = len(grammar.CONCEPTS), len(grammar.COLORS), len(grammar.TEXTURES)
    layouts = c * len(grammar.SIZES) * len(grammar.POSITIONS) + c * len(grammar.DEFAULT.counts) + c * (c - 1)
    return {
        "concepts": c,
        "sprites_only_the_autoencoder_saw": len(grammar.HELD_OUT_CONCEPTS),
        "combinations": layouts * b * t,
        "held_out_object_background_pairs": [list(pair) for pair in grammar.HELD_OUT_PAIRS],
        "test_captions_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "sprites_sha256": hashlib.sha256((folder / "sprites.png").read_bytes()).hexdigest(),
    }


def describe_training(output: Path, arch: str) -> dict:
    """Steps, pictures, hours and parameters of every trained stage."""
    stages = {}
    for folder in (output / name for name in ("vae", "decoder", arch, f"{arch}_half", f"{arch}_4_step", "grader")):
        logs = folder / "log.jsonl"
        if not logs.is_file():
            continue
        last = json.loads(logs.read_text().splitlines()[-1])
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(averaged_weights(folder))
        stages[folder.name] = {
            "steps": last["step"],
            "pictures_seen": last["step"] * config["train_batch_size"],
            "hours": round(last["seconds"] / 3600, 3),
            "parameters": sum(tensor.numel() for tensor in tensors.values()),
            **{key: config[key] for key in ("learning_rate", "lr_scheduler", "mixed_precision", "seed")},
        }
    return stages


def provenance(arguments: argparse.Namespace, weights: Path) -> dict:
    names = ("torch", "diffusers", "transformers", "accelerate", "numpy", "pillow")
    return {
        "commit": commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "device": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}, {cpu_name()}",
        "seed": arguments.seed,
        "denoiser_weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "extractor": "miniature grader, penultimate layer (128 features)",
    }


def commit() -> str | None:
    """The checkout's commit when the figures were measured, where there is git."""
    here = Path(__file__).parent
    try:
        result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def command(arguments: argparse.Namespace) -> str:
    """The command line without the machine's own paths."""
    flags = {"stage": arguments.stage, "arch": arguments.arch, "num_scenes": arguments.num_scenes}
    given = " ".join(f"--{name} {value}" for name, value in flags.items())
    return f"python scripts/train_miniature.py --output_dir runs/miniature {given}"
