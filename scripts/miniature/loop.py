"""The one training loop of the miniature: every stage (autoencoder, denoiser, grader) is trained by `train`.

All randomness of a step (batch, noise, timesteps, dropout) is seeded by (seed, step), and a batch is a function of the
step. So a run needs no saved random state, and one that was interrupted and resumed ends with bit-identical weights.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from tqdm.auto import tqdm

from .checkpoints import TrainingState, find_checkpoint, load_checkpoint, save_averaged, save_checkpoint


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
    state = TrainingState(stage.modules.to(accelerator.device).train(), config)
    folder = find_checkpoint(config.output_dir, resume_from_checkpoint)
    start, seconds = (0, 0.0) if folder is None else load_checkpoint(folder, state)
    log = Log(config, start, seconds, quiet=not accelerator.is_main_process)
    for step in log.bar:
        figures = train_step(stage, state, config, accelerator, step)
        if not accelerator.is_main_process:
            continue
        log.add(step + 1, figures)
        keep_results(stage, state, config, step + 1, log.seconds())
    state.modules.load_state_dict(state.averaged)
    return config.max_train_steps


def train_step(
    stage: Stage, state: TrainingState, config: LoopConfig, accelerator: Accelerator, step: int
) -> dict[str, float]:
    """One optimizer step, in place; returns figures for the log."""
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate_at(step, config)
    seed_step(config.seed, step, accelerator.process_index)
    with accelerator.autocast():
        loss, figures = stage.loss(step, accelerator.process_index, accelerator.num_processes)
    accelerator.backward(loss)
    average_gradients(state.parameters, accelerator.num_processes)
    norm = nn.utils.clip_grad_norm_(state.parameters, config.max_grad_norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.average(min(config.ema_decay, (1 + step) / (10 + step)))
    return {"loss": float(loss.detach()), "grad_norm": float(norm), **figures}


def keep_results(stage: Stage, state: TrainingState, config: LoopConfig, done: int, seconds: float) -> None:
    """Rung of the ladder, checkpoint and preview, where `done` steps ask for one."""
    last = done == config.max_train_steps
    if done in {max(1, round(share * config.max_train_steps)) for share in config.ladder}:
        save_averaged(state, config.output_dir / f"ema-{done}.safetensors")
    if last or done % config.checkpointing_steps == 0:
        save_checkpoint(config, done, seconds, state)
    if last or done % config.preview_steps == 0:
        with state.averaged_in_place():
            stage.preview(config.output_dir, done)


class Log:
    """Progress bar and `log.jsonl`, both of running means over about 50 steps."""

    def __init__(self, config: LoopConfig, start: int, seconds: float, quiet: bool) -> None:
        self.config, self.running = config, {}
        self.began = time.perf_counter() - seconds
        total = config.max_train_steps
        self.bar = tqdm(range(start, total), initial=start, total=total, mininterval=10, disable=quiet)

    def seconds(self) -> float:
        """Seconds trained, those before an interruption included."""
        return time.perf_counter() - self.began

    def add(self, done: int, figures: dict[str, float]) -> None:
        for key, value in figures.items():
            self.running[key] = 0.98 * self.running.get(key, value) + 0.02 * value
        if done % 50 == 0:
            self.bar.set_postfix({key: f"{value:.4g}" for key, value in self.running.items()})
        if done % 100 == 0 or done == self.config.max_train_steps:
            record = {"step": done, "seconds": round(self.seconds(), 1)}
            record |= {key: float(f"{value:.5g}") for key, value in self.running.items()}
            with (self.config.output_dir / "log.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
