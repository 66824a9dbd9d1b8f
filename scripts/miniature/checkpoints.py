"""What a training run holds in memory, and how it goes to disk and comes back: safetensors and JSON, no pickle."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from .loop import LoopConfig

logger = logging.getLogger("train_miniature")
MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainingState:
    """Modules, their averaged weights and the optimizer."""

    def __init__(self, modules: nn.Module, config: LoopConfig) -> None:
        self.modules = modules
        named = [(name, parameter) for name, parameter in modules.named_parameters() if parameter.requires_grad]
        self.names, self.parameters = zip(*named, strict=True)
        self.averaged = {name: tensor.detach().clone() for name, tensor in modules.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(0.9, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            fused=True,
        )

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """averaged <- decay * averaged + (1 - decay) * weights"""
        for name, tensor in self.modules.state_dict().items():
            if tensor.is_floating_point():
                self.averaged[name].lerp_(tensor, 1 - decay)
            else:
                self.averaged[name].copy_(tensor)

    @contextlib.contextmanager
    def averaged_in_place(self) -> Iterator[None]:
        """The modules hold the averaged weights and are in evaluation mode; both are undone afterwards."""
        kept = {name: tensor.detach().clone() for name, tensor in self.modules.state_dict().items()}
        self.modules.load_state_dict(self.averaged)
        self.modules.eval()
        try:
            yield
        finally:
            self.modules.load_state_dict(kept)
            self.modules.train()


def save_averaged(state: TrainingState, path: Path) -> None:
    """The averaged weights alone."""
    _save(state.averaged, path)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    # channels-last weights are not contiguous, and safetensors stores contiguous tensors only
    save_file(
        {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}, path
    )


def _step_of(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint folder to resume from, or None to start anew ("latest" in an empty folder starts anew).

    Raises:
        FileNotFoundError: a named checkpoint does not exist.
    """
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint == "latest":
        return max(output_dir.glob("checkpoint-*[0-9]"), key=_step_of, default=None)
    folder = Path(resume_from_checkpoint)
    folder = folder if folder.is_dir() else output_dir / resume_from_checkpoint
    if not (folder / "state.json").is_file():
        raise FileNotFoundError(f"no checkpoint at {folder}; pass a checkpoint folder or 'latest'")
    return folder


def save_checkpoint(config: LoopConfig, step: int, seconds: float, state: TrainingState) -> None:
    """Write `checkpoint-{step}` under a temporary name, rename it, then delete checkpoints over the limit."""
    final = config.output_dir / f"checkpoint-{step}"
    folder = config.output_dir / f".writing-{step}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    moments = {}
    for name, parameter in zip(state.names, state.parameters, strict=True):
        for key, value in state.optimizer.state[parameter].items():
            moments[f"{key}.{name}"] = value
    _save(state.modules.state_dict(), folder / "model.safetensors")
    _save(state.averaged, folder / "ema.safetensors")
    _save(moments, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps({"step": step, "seconds": seconds, "seed": config.seed}))
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    found = sorted(config.output_dir.glob("checkpoint-*[0-9]"), key=_step_of)
    for old in found[: -config.checkpoints_total_limit]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, state: TrainingState) -> tuple[int, float]:
    """Put weights, averages and optimizer moments back in place; returns the step and the seconds trained."""
    state.modules.load_state_dict(load_file(folder / "model.safetensors"))
    for name, tensor in load_file(folder / "ema.safetensors").items():
        state.averaged[name].copy_(tensor)
    moments = load_file(folder / "optimizer.safetensors")
    for name, parameter in zip(state.names, state.parameters, strict=True):
        # moments get the memory layout of their parameter back, as the optimizer would have made them
        held = {key: torch.empty_like(parameter).copy_(moments[f"{key}.{name}"]) for key in MOMENTS}
        state.optimizer.state[parameter] = {**held, "step": moments[f"step.{name}"].to(parameter.device)}
    record = json.loads((folder / "state.json").read_text())
    logger.info("resumed from %s at step %d", folder.name, record["step"])
    return record["step"], record["seconds"]
