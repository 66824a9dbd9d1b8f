"""Checkpoints of a router training: atomic folders of safetensors and JSON, from which it goes on to the bit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from genprune.errors import PlanMismatch
from genprune.files import whole_folder
from genprune.masks.checkpoints import checkpoints

FORMAT_VERSION = 1
TENSORS, STATE = "router_training.safetensors", "state.json"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save_checkpoint(
    folder: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    curve: list[dict[str, Any]],
    described: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write `folder/checkpoint-{step}`, whole or not at all, and delete all but the `keep` newest."""
    tensors = {f"model/{name}": value.detach().cpu().clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for moment in _MOMENTS:
            if moment in optimizer.state.get(parameter, {}):
                tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment].detach().cpu().clone()
    state = {"format_version": FORMAT_VERSION, "step": step, "described": dict(described), "curve": curve}
    path = Path(folder) / f"checkpoint-{step:06d}"
    with whole_folder(path) as written:
        save_file(tensors, written / TENSORS)
        (written / STATE).write_text(json.dumps(state))
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, described: Mapping[str, Any]
) -> tuple[int, list[dict[str, Any]]]:
    """Put a checkpoint into model and optimizer, in place; the steps done and the curve.

    Raises:
        PlanMismatch: it cannot be read, is of a newer format or was made with other settings, prompts or model.
    """
    try:
        state, tensors = json.loads((path / STATE).read_text()), load_file(path / TENSORS)
        version, before = int(state["format_version"]), dict(state["described"])
        step, curve = int(state["step"]), list(state["curve"])
    except (OSError, TypeError, ValueError, KeyError, SafetensorError) as error:
        raise PlanMismatch(
            f"'{path}' is no checkpoint of a router training ({error}); expected a folder with {STATE} and {TENSORS}. "
            "Delete it to resume from the one before."
        ) from None
    if version > FORMAT_VERSION:
        raise PlanMismatch(
            f"'{path}' has format {version}, this genprune reads up to {FORMAT_VERSION}. Upgrade with "
            "`pip install -U genprune`."
        )
    now = json.loads(json.dumps(dict(described)))  # compared as JSON has it, in which tuples are lists
    if changed := sorted(name for name in {*now, *before} if now.get(name) != before.get(name)):
        name = changed[0]
        raise PlanMismatch(
            f"'{path}' was made with {name}={before.get(name)!r}, this run has {now.get(name)!r}. Resume with the "
            "same settings, or start anew in another folder."
        )
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model/")})
    for name, parameter in model.named_parameters():
        for moment in _MOMENTS:
            if f"{moment}/{name}" in tensors:
                device = "cpu" if moment == "step" else parameter.device
                optimizer.state[parameter][moment] = tensors[f"{moment}/{name}"].to(device)
    return step, curve
