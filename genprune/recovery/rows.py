"""Batches of a recovery: rows with a target, and how student and teacher are called and compared on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class NoisedRows:
    """Inputs of a denoiser and what it should predict.

    Args:
        inputs: its keyword arguments.
        target: shape `(rows, ...)`.
        weights: of each row's prediction terms, shape `(rows,)`; None: 1.
    """

    inputs: Mapping[str, Any] = field(repr=False)
    target: Tensor = field(repr=False)
    weights: Tensor | None = field(default=None, repr=False)

    @property
    def rows(self) -> int:
        return self.target.shape[0]

    def to(self, device: torch.device) -> NoisedRows:
        weights = None if self.weights is None else self.weights.to(device)
        return replace(self, inputs=_moved(self.inputs, device, None), target=self.target.to(device), weights=weights)

    def predict(self, model: nn.Module) -> Tensor:
        """The model's output, all channels; floating inputs in the dtype of its weights."""
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        return model(**_moved(self.inputs, None, dtype), return_dict=False)[0]

    def task_loss(self, prediction: Tensor) -> Tensor:
        """Mean squared error to the target; a learned variance, which comes after the prediction, has none."""
        return self._mean((_wide(prediction[:, : self.target.shape[1]]) - self.target).square())

    def output_loss(self, prediction: Tensor, teacher: Tensor) -> Tensor:
        """Mean squared error to the teacher's output, all channels."""
        return self._mean((_wide(prediction) - _wide(teacher)).square())

    def _mean(self, errors: Tensor) -> Tensor:
        rows = errors.flatten(1).mean(1)
        return (rows if self.weights is None else rows * self.weights).mean()


@dataclass(frozen=True)
class LabelledImages:
    """Images `(rows, 3, H, W)` and class labels `(rows,)`; `distance` and `temperature` compare logits."""

    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    distance: str = "kl"
    temperature: float = 1.0

    @property
    def rows(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device) -> LabelledImages:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def predict(self, model: nn.Module) -> Tensor:
        """Logits, shape `(rows, classes)`."""
        return model(self.images.to(next(model.parameters()).dtype))

    def task_loss(self, prediction: Tensor) -> Tensor:
        """Cross-entropy."""
        return functional.cross_entropy(_wide(prediction), self.labels)

    def output_loss(self, prediction: Tensor, teacher: Tensor) -> Tensor:
        """`T^2 KL(softmax(teacher / T) | softmax(student / T))`, or the mean squared error of logits."""
        ours, theirs = _wide(prediction), _wide(teacher)
        if self.distance == "mse":
            return functional.mse_loss(ours, theirs)
        ours, theirs = (functional.log_softmax(each / self.temperature, -1) for each in (ours, theirs))
        return self.temperature**2 * functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


Rows = NoisedRows | LabelledImages


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def _moved(value: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    """Tensors on a device, and floating ones in a dtype; None leaves that as it is."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {name: _moved(item, device, dtype) for name, item in value.items()}
    return value
