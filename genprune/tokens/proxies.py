"""How far a model with fewer tokens is from itself with all, on images without labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genprune.errors import BadCalibrationData
from genprune.tokens import checks

DISTANCES = ("cosine", "mse", "kl")


def as_batches(images: Tensor | Iterable, batch_size: int) -> list[Tensor]:
    """Images as batches.

    Args:
        images: `(count, channels, height, width)`, normalised as the model wants them; or batches of any size of them.
        batch_size: of the batches that a tensor is split into.

    Raises:
        BadCalibrationData: there are none, or they are not of that shape.
    """
    checks.check_whole("batch_size", batch_size, 1)
    batches = list(images.split(batch_size)) if isinstance(images, Tensor) else list(images)
    for batch in batches:
        if not isinstance(batch, Tensor) or batch.ndim != 4 or not batch.is_floating_point():
            shape = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise BadCalibrationData(
                f"calibration images have a batch of {shape}; expected floating-point tensors of shape (batch, "
                "channels, height, width), normalised as the model wants them. Pass such a tensor, or batches of it."
            )
    if not batches or sum(map(len, batches)) == 0:
        raise BadCalibrationData("there are no calibration images; expected some, 32 or more. Pass images=...")
    return batches


def outputs(model: nn.Module, batches: Sequence[Tensor], distance: str) -> Tensor:
    """What the distance compares, a row an image, float32 on the CPU: pooled features, or logits for `kl`."""
    device = next(model.parameters()).device
    rows = [_output(model, batch.to(device=device), distance).flatten(1).float().cpu() for batch in batches]
    return torch.cat(rows)


def distance_between(dense: Tensor, reduced: Tensor, distance: str) -> float:
    """Mean over images, >= 0 but for rounding, 0 where they are alike.

    Args:
        dense, reduced: `(images, width)`, see `outputs`.
        distance: `cosine`: 1 - cos. `mse`: squared error over the dense rows' mean square. `kl`: of the classes'
            probabilities, in nats.
    """
    if distance == "cosine":
        return (1 - F.cosine_similarity(dense, reduced, dim=1)).mean().item()
    if distance == "mse":
        return ((dense - reduced).square().mean() / dense.square().mean().clamp(min=1e-12)).item()
    dense, reduced = dense.log_softmax(1), reduced.log_softmax(1)
    return (dense.exp() * (dense - reduced)).sum(1).mean().item()


def agreement(dense: Tensor, reduced: Tensor) -> float:
    """Share of images whose largest logit is the same."""
    return (dense.argmax(1) == reduced.argmax(1)).float().mean().item()


def _output(model: nn.Module, batch: Tensor, distance: str) -> Tensor:
    if distance == "kl" or not hasattr(model, "forward_head"):
        return model(batch)
    return model.forward_head(model.forward_features(batch), pre_logits=True)
