"""The one training loop of the miniature: every stage (autoencoder, denoiser, grader) is trained by `train`.

All randomness of a step (batch, noise, timesteps, dropout) is seeded by (seed, step), and a batch is a function of the
step. So a run needs no saved random state, and one that was interrupted and resumed ends with bit-identical weights.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator, PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

logger = logging.getLogger("train_miniature")


class Stage(Protocol):
    """What `train` needs to know about the thing that it trains."""

    modules: nn.ModuleDict

    def loss(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, dict[str, float]]:
        """Scalar loss of this process's share of batch number `step`, and figures for the log."""

    def preview(self, folder: Path, step: int) -> None:
        """Write pictures for a person to look at; called with the averaged weights in place."""


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast to train.

    Args:
        output_dir: holds `checkpoint-{step}` folders, `ema-{step}.safetensors` and `log.jsonl`.
        max_train_steps: optimizer steps of the whole run, also after a resume.
        learning_rate: peak of the schedule.
        lr_scheduler: "cosine" (to 1 % of the peak), "warmup_stable_decay" (linear to 0 over the last
            `lr_decay_share` of the steps; its end can still be moved when resuming) or "constant".
        lr_warmup_steps: steps of linear warm-up.
        lr_decay_share: see `lr_scheduler`.
        adam_beta2, adam_weight_decay, max_grad_norm: as in diffusers' scripts.
        ema_decay: of the averaged weights, warmed up as (1 + step) / (10 + step).
        checkpointing_steps: a checkpoint is written every so many steps and at the end.
        checkpoints_total_limit: older checkpoints are deleted.
        ladder: shares of `max_train_steps` at which averaged weights are kept for good.
        mixed_precision: "no" or "bf16".
    """

    output_dir: Path
    max_train_steps: int
    learning_rate: float
    lr_scheduler: str = "warmup_stable_decay"
    lr_warmup_steps: int = 100
    lr_decay_share: float = 0.3
    adam_beta2: float = 0.99
    adam_weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.998
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    ladder: tuple[float, ...] = (0.03, 0.1, 0.3, 0.6, 1.0)
    mixed_precision: str = "no"
    seed: int = 0
    preview_steps: int = 500


def learning_rate_at(step: int, config: LoopConfig) -> float:
    """Learning rate of optimizer step number `step` (from 0): a function of the step alone, so nothing to save."""
    warmup = min(1.0, (step + 1) / max(1, config.lr_warmup_steps))
    progress = step / config.max_train_steps
    if config.lr_scheduler == "cosine":
        shape = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))
    elif config.lr_scheduler == "warmup_stable_decay":
        shape = min(1.0, (1 - progress) / config.lr_decay_share)
    elif config.lr_scheduler == "constant":
        shape = 1.0
    else:
        raise ValueError(
            f"lr_scheduler {config.lr_scheduler!r} is unknown; choose cosine, warmup_stable_decay or constant"
        )
    return config.learning_rate * warmup * shape


def process_state() -> PartialState:
    """Rank and number of processes; without a GPU, several processes talk through gloo."""
    return PartialState(cpu=not torch.cuda.is_available())


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step of one process; the factors keep the triples of ordinary runs apart."""
    torch.manual_seed((seed * 64 + rank) * 10_000_019 + step)


def average_gradients(parameters: Sequence[Tensor], world: int) -> None:
    """Replace every gradient by its mean over all processes, in one message.

    By hand, because a stage calls its modules directly and a `DistributedDataParallel` wrapper would not notice.
    """
    if world == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= world
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))


def train(stage: Stage, config: LoopConfig, resume_from_checkpoint: str | None = None) -> int:
    """Train `stage.modules` in place and leave the averaged weights in them.

    Args:
        resume_from_checkpoint: "latest", a checkpoint's path, or None to start anew.

    Returns:
        The number of the last step.
    """
    config.output_dir.mkdir(parents=True, exist_ok=True)
    process_state()
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=not torch.cuda.is_available())
    rank, world, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    modules = stage.modules.to(accelerator.device).train()
    names, parameters = zip(*((n, p) for n, p in modules.named_parameters() if p.requires_grad), strict=True)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(0.9, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        fused=True,
    )
    averaged = {name: tensor.detach().clone() for name, tensor in modules.state_dict().items()}
    start, seconds = 0, 0.0
    folder = find_checkpoint(config.output_dir, resume_from_checkpoint)
    if folder is not None:
        start, seconds = load_checkpoint(folder, modules, averaged, optimizer, names, parameters)
    began = time.perf_counter() - seconds
    ladder = {max(1, round(share * config.max_train_steps)) for share in config.ladder}
    bar = tqdm(
        range(start, config.max_train_steps),
        initial=start,
        total=config.max_train_steps,
        mininterval=10,
        disable=not main,
    )
    running: dict[str, float] = {}
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        seed_step(config.seed, step, rank)
        with accelerator.autocast():
            loss, figures = stage.loss(step, rank, world)
        accelerator.backward(loss)
        average_gradients(parameters, world)
        norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        _average(averaged, modules, min(config.ema_decay, (1 + step) / (10 + step)))
        if not main:
            continue
        for key, value in {"loss": float(loss.detach()), "grad_norm": float(norm), **figures}.items():
            running[key] = 0.98 * running.get(key, value) + 0.02 * value
        if done % 50 == 0:
            bar.set_postfix({key: f"{value:.4g}" for key, value in running.items()})
        if done % 100 == 0 or done == config.max_train_steps:
            record = {"step": done, "seconds": round(time.perf_counter() - began, 1)}
            record |= {key: float(f"{value:.5g}") for key, value in running.items()}
            with (config.output_dir / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
        if done in ladder:
            _save(averaged, config.output_dir / f"ema-{done}.safetensors")
        if done % config.checkpointing_steps == 0 or done == config.max_train_steps:
            seconds = time.perf_counter() - began
            save_checkpoint(config, done, seconds, modules, averaged, optimizer, names, parameters)
        if done % config.preview_steps == 0 or done == config.max_train_steps:
            with swapped(modules, averaged):
                stage.preview(config.output_dir, done)
    modules.load_state_dict(averaged)
    return config.max_train_steps


@torch.no_grad()
def _average(averaged: dict[str, Tensor], modules: nn.Module, decay: float) -> None:
    for name, tensor in modules.state_dict().items():
        if tensor.is_floating_point():
            averaged[name].lerp_(tensor, 1 - decay)
        else:
            averaged[name].copy_(tensor)


class swapped:  # noqa: N801 (used as a verb)
    """Context in which `modules` hold the averaged weights and are in evaluation mode; both are undone afterwards."""

    def __init__(self, modules: nn.Module, averaged: dict[str, Tensor]) -> None:
        self.modules, self.averaged = modules, averaged

    def __enter__(self) -> None:
        self.kept = {name: tensor.detach().clone() for name, tensor in self.modules.state_dict().items()}
        self.modules.load_state_dict(self.averaged)
        self.modules.eval()

    def __exit__(self, *exception) -> None:
        self.modules.load_state_dict(self.kept)
        self.modules.train()


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    # channels-last weights are not contiguous, and safetensors stores contiguous tensors only
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint folder to resume from, or None to start anew ("latest" in an empty folder starts anew).

    Raises:
        FileNotFoundError: a named checkpoint does not exist.
    """
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint == "latest":
        found = sorted(output_dir.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))
        return found[-1] if found else None
    folder = Path(resume_from_checkpoint)
    folder = folder if folder.is_dir() else output_dir / resume_from_checkpoint
    if not (folder / "state.json").is_file():
        raise FileNotFoundError(f"no checkpoint at {folder}; pass a checkpoint folder or 'latest'")
    return folder


def save_checkpoint(config, step, seconds, modules, averaged, optimizer, names, parameters) -> None:
    """Write `checkpoint-{step}` under a temporary name, rename it, then delete checkpoints over the limit."""
    final = config.output_dir / f"checkpoint-{step}"
    folder = config.output_dir / f".writing-{step}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    moments = {}
    for name, parameter in zip(names, parameters, strict=True):
        for key, value in optimizer.state[parameter].items():
            moments[f"{key}.{name}"] = value.detach()
    _save(modules.state_dict(), folder / "model.safetensors")
    _save(averaged, folder / "ema.safetensors")
    _save(moments, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps({"step": step, "seconds": seconds, "seed": config.seed}))
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    found = sorted(config.output_dir.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))
    for old in found[: -config.checkpoints_total_limit]:
        shutil.rmtree(old)


def load_checkpoint(folder, modules, averaged, optimizer, names, parameters) -> tuple[int, float]:
    """Put a checkpoint's weights, averages and optimizer moments back; returns its step and seconds trained."""
    modules.load_state_dict(load_file(folder / "model.safetensors"))
    for name, tensor in load_file(folder / "ema.safetensors").items():
        averaged[name].copy_(tensor)
    moments = load_file(folder / "optimizer.safetensors")
    for name, parameter in zip(names, parameters, strict=True):
        # moments get the memory layout of their parameter back, as the optimizer would have made them
        optimizer.state[parameter] = {
            key: torch.empty_like(parameter).copy_(moments[f"{key}.{name}"]) for key in ("exp_avg", "exp_avg_sq")
        }
        optimizer.state[parameter]["step"] = moments[f"step.{name}"]
    state = json.loads((folder / "state.json").read_text())
    logger.info("resumed from %s at step %d", folder, state["step"])
    return state["step"], state["seconds"]
