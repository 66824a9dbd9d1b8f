"""What a gradient criterion is calibrated on: batches that know their loss, one value per row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class DenoisingBatch:
    """Noised inputs at one timestep and what the denoiser should predict.

    Args:
        inputs: keyword arguments of the denoiser.
        target: shape `(rows, ...)`.
        timestep: of every row, in the scheduler's scale; groups losses and scores.
    """

    inputs: Mapping[str, Any] = field(repr=False)
    target: Tensor = field(repr=False)
    timestep: float = 0.0

    @property
    def rows(self) -> int:
        return self.target.shape[0]

    def losses(self, model: nn.Module) -> Tensor:
        """Mean squared error of each row, shape `(rows,)`, float32 or wider."""
        prediction = model(**self.inputs, return_dict=False)[0]
        prediction = prediction[:, : self.target.shape[1]]  # a learned variance comes after the prediction
        wide = prediction.float() if prediction.dtype.itemsize < 4 else prediction
        return (wide - self.target).square().flatten(1).mean(1)


@dataclass(frozen=True)
class ImageBatch:
    """Images `(rows, 3, H, W)` and class labels `(rows,)`."""

    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    timestep: float = 0.0

    @property
    def rows(self) -> int:
        return self.images.shape[0]

    def losses(self, model: nn.Module) -> Tensor:
        """Cross-entropy of each row, shape `(rows,)`."""
        return functional.cross_entropy(model(self.images).float(), self.labels, reduction="none")


@dataclass(frozen=True)
class LossBatch:
    """Anything, with a loss of the user's own: `loss_fn(model, batch)` returns a scalar. Counts as one row."""

    batch: Any = field(repr=False)
    loss_fn: Callable[[nn.Module, Any], Tensor] = field(repr=False)
    timestep: float = 0.0
    rows: int = 1

    def losses(self, model: nn.Module) -> Tensor:
        return self.loss_fn(model, self.batch).reshape(-1).sum(0, keepdim=True)
