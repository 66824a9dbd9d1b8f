"""Checkpoints of a recovery: whole folders of safetensors and JSON, from which it goes on to the bit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genprune.errors import PlanMismatch
from genprune.files import whole_folder
from genprune.masks.checkpoints import checkpoints
from genprune.recovery.averages import AveragedWeights, copy_weights
from genprune.recovery.divergence import DivergenceGuard
from genprune.recovery.normalizers import RunningScales

FORMAT_VERSION = 1
STATE = "state.json"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class TrainingState:
    """All that changes from step to step, but for the curve.

    Args:
        parameters: name -> trained parameter, the log-variances of terms among them.
        optimizer: AdamW over them.
        scales: of the taps.
        guard: against divergence.
        average: of the parameters, or None.
        scaler: the gradient scaler of float16, or None.
        step: optimiser steps done.
    """

    parameters: dict[str, nn.Parameter] = field(repr=False)
    optimizer: torch.optim.Optimizer = field(repr=False)
    scales: RunningScales
    guard: DivergenceGuard
    average: AveragedWeights | None = field(default=None, repr=False)
    scaler: Any = field(default=None, repr=False)
    step: int = 0

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Copies on the CPU by file: model, optimizer, ema."""
        groups = {"model": {name: _kept(value) for name, value in self.parameters.items()}, "optimizer": {}}
        for name, parameter in self.parameters.items():
            held = self.optimizer.state.get(parameter, {})
            groups["optimizer"] |= {f"{moment}/{name}": _kept(held[moment]) for moment in _MOMENTS if moment in held}
        if self.average is not None:
            groups["ema"] = {name: _kept(value) for name, value in self.average.weights.items()}
        return groups

    def numbers(self) -> dict[str, Any]:
        """Everything else, as JSON has it."""
        scaler = None if self.scaler is None else self.scaler.state_dict()
        parts = {"scales": self.scales.to_json(), "guard": self.guard.to_json(), "scaler": scaler}
        return {"step": self.step, **json.loads(json.dumps(parts))}

    def put(self, tensors: Mapping[str, Mapping[str, Tensor]], numbers: Mapping[str, Any]) -> None:
        """Put back what `tensors` and `numbers` gave, in place."""
        copy_weights(self.parameters, tensors["model"])
        self.optimizer.state.clear()
        for key, value in tensors["optimizer"].items():
            moment, name = key.split("/", 1)
            parameter = self.parameters[name]
            # AdamW keeps its step count on the CPU
            device = "cpu" if moment == "step" else parameter.device
            self.optimizer.state[parameter][moment] = value.to(device, copy=True)
        if self.average is not None:
            for name, value in tensors["ema"].items():
                self.average.weights[name].copy_(value)
        self.scales.energies, self.scales.count = list(numbers["scales"]["energies"]), numbers["scales"]["count"]
        self.guard.losses, self.guard.above = list(numbers["guard"]["losses"]), numbers["guard"]["above"]
        if self.scaler is not None and numbers["scaler"]:
            self.scaler.load_state_dict(numbers["scaler"])
        self.step = numbers["step"]


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def save_checkpoint(
    folder: str | os.PathLike, state: TrainingState, described: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write `folder/checkpoint-{step}`, whole or not at all, and delete all but the `keep` newest."""
    from safetensors.torch import save_file

    path = Path(folder) / f"checkpoint-{state.step:06d}"
    with whole_folder(path) as written:
        for name, tensors in state.tensors().items():
            save_file(tensors, written / f"{name}.safetensors")
        data = {"format_version": FORMAT_VERSION, "described": dict(described), **state.numbers()}
        (written / STATE).write_text(json.dumps(data))
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def load_checkpoint(path: Path, state: TrainingState, described: Mapping[str, Any]) -> None:
    """Put a checkpoint into a training's state, in place, after every check.

    Raises:
        PlanMismatch: it cannot be read, is of a newer format, of another model, or was made with other settings.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        numbers = json.loads((path / STATE).read_text())
        files = ("model", "optimizer", *(("ema",) if state.average is not None else ()))
        version, before = int(numbers["format_version"]), dict(numbers["described"])
        _check_description(path, version, before, described)
        tensors = {name: load_file(path / f"{name}.safetensors") for name in files}
        [numbers[name] for name in ("step", "scales", "guard", "scaler")]
    except (OSError, TypeError, KeyError, ValueError, SafetensorError) as error:
        if isinstance(error, PlanMismatch):
            raise
        raise PlanMismatch(
            f"'{path}' is no checkpoint of a recovery ({error}); expected a folder with {STATE} and safetensors. "
            "Delete it to resume from the one before."
        ) from None
    shapes = {name: tuple(value.shape) for name, value in state.parameters.items()}
    found = {name: tuple(value.shape) for name, value in tensors["model"].items()}
    if other := sorted(name for name in {*shapes, *found} if shapes.get(name) != found.get(name)):
        raise PlanMismatch(
            f"'{path}' has '{other[0]}' as {found.get(other[0])}, this model has {shapes.get(other[0])}; expected the "
            "same trained parameters. Resume with the model that was cut by the same plan, or in another output_dir."
        )
    state.put(tensors, numbers)


def _check_description(path: Path, version: int, before: Mapping[str, Any], described: Mapping[str, Any]) -> None:
    if version > FORMAT_VERSION:
        raise PlanMismatch(
            f"'{path}' has format {version}, this genprune reads up to {FORMAT_VERSION}. Upgrade with "
            "`pip install -U genprune`."
        )
    now = json.loads(json.dumps(dict(described)))  # compared as JSON has it, in which tuples are lists
    if changed := sorted(name for name in {*now, *before} if now.get(name) != before.get(name)):
        name = changed[0]
        raise PlanMismatch(
            f"'{path}' was made with {name}={_short(before.get(name))}, this run has {_short(now.get(name))}. Resume "
            "with the same settings, model and data, or start anew in another output_dir."
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 120 else text[:117] + "..."


class Snapshots:
    """The states that a failing run can go back to: checkpoints on disk, or copies in memory without a folder.

    Args:
        folder: of the checkpoints; None keeps two copies in memory.
        writes: whether this process writes to the folder.
        limit: how many checkpoints stay, >= 2: the newest may turn out bad.
    """

    def __init__(
        self, folder: str | os.PathLike | None, described: Mapping[str, Any], writes: bool = True, limit: int = 2
    ) -> None:
        self.folder, self.described, self.writes, self.limit = folder, described, writes, max(2, limit)
        self.held: list[tuple[dict, dict]] = []

    def save(self, state: TrainingState) -> None:
        if self.folder is None:
            self.held = [*self.held, (state.tensors(), state.numbers())][-2:]
        elif self.writes:
            save_checkpoint(self.folder, state, self.described, self.limit)

    def go_back(self, state: TrainingState, before: int) -> int:
        """Restore the newest state of fewer than `before` steps, or the oldest. Returns its step."""
        if self.folder is None:
            good = [pair for pair in self.held if pair[1]["step"] < before] or self.held[:1]
            state.put(*good[-1])
            return state.step
        found = checkpoints(self.folder)
        good = [path for path in found if int(path.name.split("-")[1]) < before] or found[:1]
        load_checkpoint(good[-1], state, self.described)
        return state.step

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints of more steps: a resumed run must not go on from what failed."""
        if self.folder is not None and self.writes:
            for path in checkpoints(self.folder):
                if int(path.name.split("-")[1]) > step:
                    shutil.rmtree(path)
