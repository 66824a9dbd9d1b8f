"""Training of the classifier: AdamW, cosine schedule, shifts and flips; a checkpoint after every epoch."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from genprune.files import whole_folder
from scripts.vit.data import MEAN, STD, FashionMNIST

logger = logging.getLogger("train_vit")
CHECKPOINT = "checkpoint"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Training:
    """Settings of one run.

    Args:
        epochs: passes over the training images, >= 1.
        batch_size: images a step.
        learning_rate: of AdamW at its peak, after the warm-up; then a cosine down to 0.
        weight_decay: of matrices; biases and norms have none.
        warmup: share of the steps.
        shift: pixels that an image is moved by at most, each way. In few epochs of 7-pixel patches it costs accuracy.
        mirror: share of the images that are mirrored.
        label_smoothing: share of the target that is spread over all classes.
        seed: of weights, order and augmentation.
        mixed_precision: `bf16` runs forward calls under autocast, weights stay float32; or `no`.
    """

    epochs: int = 5
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    shift: int = 0
    mirror: float = 0.0
    label_smoothing: float = 0.05
    seed: int = 0
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"mixed_precision is '{self.mixed_precision}'; expected 'no' or 'bf16'.")


@dataclass
class Progress:
    """Epochs done, their records, and the seconds that they took: of the clock, and of the processor."""

    epoch: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


def augmented(images: Tensor, shift: int, mirror: float, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `shift` pixels each way; a share of them mirrored. Shape `(n, 1, h, w)`."""
    count, _, height, width = images.shape
    padded = functional.pad(images[:, 0], [shift] * 4, value=-MEAN / STD)  # (n, h + 2 shift, w + 2 shift): background
    start = torch.randint(2 * shift + 1, (2, count, 1), generator=generator)
    rows, columns = start[0] + torch.arange(height), start[1] + torch.arange(width)  # (n, h), (n, w)
    mirrored = torch.rand(count, 1, generator=generator) < mirror
    columns = torch.where(mirrored, columns.flip(1), columns)
    moved = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]  # (n, h, w)
    return moved.unsqueeze(1)


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """The share of the peak learning rate at one step: linear up, then half a cosine down to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """Share of images whose most likely class is their label, in evaluation mode; the mode is put back."""
    mode = model.training
    model.eval()
    right = sum(
        int((model(part).argmax(1) == answers).sum())
        for part, answers in zip(images.split(batch_size), labels.split(batch_size))
    )
    model.train(mode)
    return right / len(labels)


def train(model: nn.Module, data: FashionMNIST, settings: Training, output: Path, resume: bool = False) -> Progress:
    """Train in place; a checkpoint after every epoch, from which `resume` goes on to the bit.

    Raises:
        ValueError: the checkpoint is of other settings, or there is one and `resume` is False.
    """
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
    progress = _resumed(model, optimizer, settings, output / CHECKPOINT, resume)
    model.train()
    for epoch in range(progress.epoch, settings.epochs):
        began, began_cpu = time.perf_counter(), time.process_time()
        loss = _epoch(model, optimizer, data, settings, epoch)
        progress.seconds += time.perf_counter() - began
        progress.cpu_seconds += time.process_time() - began_cpu
        progress.epoch = epoch + 1
        record = {"epoch": epoch + 1, "loss": loss, "dev_accuracy": accuracy(model, data.dev_images, data.dev_labels)}
        progress.curve.append(record)
        logger.info("%s after %.0f s", record, progress.seconds)
        _save(model, optimizer, settings, progress, output / CHECKPOINT)
    model.eval()
    return progress


def _epoch(model: nn.Module, optimizer, data: FashionMNIST, settings: Training, epoch: int) -> float:
    """One pass; order and augmentation are functions of seed and epoch. Returns the mean loss."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    order = torch.randperm(len(data.train_images), generator=generator)
    batches = order.split(settings.batch_size)
    total = 0.0
    for index, chosen in enumerate(batches):
        factor = rate_factor(epoch * len(batches) + index, settings.epochs * len(batches), settings.warmup)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        images = augmented(data.train_images[chosen], settings.shift, settings.mirror, generator)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=settings.mixed_precision == "bf16"):
            logits = model(images)
        loss = functional.cross_entropy(
            logits.float(), data.train_labels[chosen], label_smoothing=settings.label_smoothing
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += float(loss.detach()) * len(chosen)
        if index % 50 == 0:
            logger.info("epoch %d, step %d of %d: loss %.3f", epoch + 1, index + 1, len(batches), float(loss.detach()))
    return total / len(order)


def _save(model: nn.Module, optimizer, settings: Training, progress: Progress, folder: Path) -> None:
    tensors = {f"model/{name}": value.clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{moment}/{name}": optimizer.state[parameter][moment].clone() for moment in MOMENTS}
    with whole_folder(folder) as written:
        save_file(tensors, written / "training.safetensors")
        state: dict[str, Any] = {"settings": dataclasses.asdict(settings), **vars(progress)}
        (written / "state.json").write_text(json.dumps(state))


def _resumed(model: nn.Module, optimizer, settings: Training, folder: Path, resume: bool) -> Progress:
    if not folder.exists():
        return Progress()
    if not resume:
        raise ValueError(f"'{folder}' is of an earlier run; expected none. Pass --resume, or another --out.")
    state = json.loads((folder / "state.json").read_text())
    if (before := state.pop("settings")) != dataclasses.asdict(settings):
        raise ValueError(
            f"'{folder}' was made with {before}, this run has {dataclasses.asdict(settings)}; expected the same. Pass "
            "the same flags, or another --out."
        )
    tensors = load_file(folder / "training.safetensors")
    model.load_state_dict({name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")})
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {moment: tensors[f"{moment}/{name}"] for moment in MOMENTS}
    return Progress(**state)
