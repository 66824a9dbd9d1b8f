"""The mean of a paired score over many batches and processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from genprune.metrics.errors import BadImages
from genprune.metrics.latent_error import latent_mse
from genprune.metrics.result import MetricResult
from genprune.metrics.signal_to_noise import psnr
from genprune.metrics.structural_similarity import ssim

NAMES = {psnr: ("PSNR", "dB"), ssim: ("SSIM", ""), latent_mse: ("latent MSE", "")}


class PairedFidelity(Metric):
    """Mean over pictures of `psnr`, `ssim`, `latent_mse`, or a function of yours. `update(x, y)`, `compute()`.

    Args:
        score: from two batches to one value a picture, shape `(B,)`.
        kwargs: torchmetrics' own.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, score: Callable[[Tensor, Tensor], Tensor], **kwargs: Any):
        super().__init__(**kwargs)
        self.score = score
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def name(self) -> str:
        return NAMES.get(self.score, (self.score.__name__, ""))[0]

    def update(self, x: Tensor, y: Tensor) -> None:
        values = self.score(x, y)
        self.total += values.sum().to(self.total.device)
        self.count += len(values)

    def compute(self) -> Tensor:
        if self.count == 0:
            raise BadImages(f"{self.name} has seen no pictures, expected at least 1 pair. Call update(x, y).")
        self.pairs = int(self.count)  # of all processes: the state holds only this process's afterwards
        return self.total / self.count

    def result(self) -> MetricResult:
        """The mean with its name, unit and the number of pairs."""
        unit = NAMES.get(self.score, ("", ""))[1]
        return MetricResult(self.name, self.compute().item(), self.pairs, unit=unit)
