"""Checkpoints of a mask training: atomic folders of safetensors and JSON, from which it goes on to the bit."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from genprune.errors import PlanMismatch
from genprune.files import whole_folder
from genprune.masks.budget import BudgetController
from genprune.masks.logits import MaskLogits

FORMAT_VERSION = 1
TENSORS, STATE = "training.safetensors", "state.json"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class Progress:
    """Where a training is.

    Attributes:
        step: optimiser steps done.
        curve: one record a step: loss, expected share, price; and validation losses.
        best: the logits of the best look at the plan, its loss and step; empty before the first.
        worse: looks since then.
    """

    step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_loss: float | None = None
    best_step: int | None = None
    worse: int = 0


def save_checkpoint(
    folder: str | os.PathLike,
    logits: MaskLogits,
    optimizer: torch.optim.Optimizer,
    controller: BudgetController,
    progress: Progress,
    settings: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write `folder/checkpoint-{step}`, whole or not at all, and delete all but the `keep` newest."""
    tensors = {f"logits/{name}": values for name, values in logits.detached().items()}
    tensors |= {f"best/{name}": values for name, values in progress.best.items()}
    for name, parameter in logits.items():
        for moment in _MOMENTS:
            if moment in optimizer.state[parameter]:
                tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment].detach().cpu().clone()
    state = {
        "format_version": FORMAT_VERSION,
        "settings": dict(settings),
        "controller": asdict(controller),
        **{name: value for name, value in vars(progress).items() if name != "best"},
    }
    path = Path(folder) / f"checkpoint-{progress.step:06d}"
    with whole_folder(path) as written:
        save_file(tensors, written / TENSORS)
        (written / STATE).write_text(json.dumps(state))
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))


def load_checkpoint(
    path: Path,
    logits: MaskLogits,
    optimizer: torch.optim.Optimizer,
    controller: BudgetController,
    settings: Mapping[str, Any],
) -> Progress:
    """Put a checkpoint into logits, optimizer and controller, in place.

    Raises:
        PlanMismatch: it cannot be read, is of a newer format or other sites, or was made with other settings.
    """
    try:
        state, tensors = json.loads((path / STATE).read_text()), load_file(path / TENSORS)
        version, before = int(state["format_version"]), dict(state["settings"])
        fields = {name: state[name] for name in ("step", "curve", "best_loss", "best_step", "worse")}
        steered = {name: state["controller"][name] for name in asdict(controller)}
    except (OSError, TypeError, ValueError, KeyError, SafetensorError) as error:
        raise PlanMismatch(
            f"'{path}' is no checkpoint of a mask training ({error}); expected a folder with {STATE} and {TENSORS}. "
            "Delete it to resume from the one before."
        ) from None
    if version > FORMAT_VERSION:
        raise PlanMismatch(
            f"'{path}' has format {version}, this genprune reads up to {FORMAT_VERSION}. Upgrade with "
            "`pip install -U genprune`."
        )
    # compared as JSON has it, in which tuples are lists
    now = json.loads(json.dumps(dict(settings)))
    if changed := sorted(name for name in {*now, *before} if now.get(name) != before.get(name)):
        name = changed[0]
        raise PlanMismatch(
            f"'{path}' was made with {name}={before.get(name)!r}, this run has {now.get(name)!r}. Resume with the "
            "same settings, or start anew in another folder."
        )
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        group, name = key.split("/", 1)
        groups.setdefault(group, {})[name] = tensor
    logits.copy_(groups.get("logits", {}))
    for moment in _MOMENTS:
        for name, tensor in groups.get(moment, {}).items():
            parameter = logits[name]
            # AdamW keeps its step count on the CPU
            device = "cpu" if moment == "step" else parameter.device
            optimizer.state[parameter][moment] = tensor.to(device)
    for name, value in steered.items():
        setattr(controller, name, value)
    return Progress(best=groups.get("best", {}), **fields)
