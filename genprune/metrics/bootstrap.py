"""Intervals by resampling: how far a mean, or the difference of two paired means, could have come out otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genprune.errors import GenpruneError
from genprune.metrics.errors import BadImages


@dataclass(frozen=True)
class Interval:
    """An estimate and its bootstrap interval.

    Attributes:
        estimate: on the data as they are.
        low, high: ends of the interval.
        level: its share of the resamples, e.g. 0.95.
        count: values (pairs) it rests on.
    """

    estimate: float
    low: float
    high: float
    level: float
    count: int

    def __str__(self) -> str:
        return f"{self.estimate:.4g} [{self.low:.4g}, {self.high:.4g}]"

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


def mean(values: Tensor) -> Tensor:
    return values.mean(-1)


def median(values: Tensor) -> Tensor:
    return values.quantile(0.5, dim=-1)  # unlike torch.median, halfway between the middle two


def bootstrap_interval(
    values: Tensor,
    statistic: Callable[[Tensor], Tensor] = mean,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a statistic of independent values.

    Too narrow below about 20 values, as every percentile bootstrap is.

    Args:
        values: shape `(N,)`, N >= 2, finite.
        statistic: reduces the last dimension; `mean` (default) or `median`.
        resamples: how many; 2,000 puts the ends within about 2 % of the interval's width.
        level: share of the resamples inside, in (0, 1).
        seed: of the resampling; the global random state is left alone.

    Raises:
        BadImages: fewer than two values, or one that is not finite. GenpruneError: a level outside (0, 1).

    Reference:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3.
    """
    values = values.detach().double().cpu()
    if values.ndim != 1 or len(values) < 2 or not torch.isfinite(values).all():
        raise BadImages(
            f"a bootstrap needs at least 2 finite values in one dimension, got shape {tuple(values.shape)}"
            f"{' with NaN or infinity' if values.numel() and not torch.isfinite(values).all() else ''}. "
            "Draw more images, or check what produced the values."
        )
    if not 0 < level < 1 or resamples < 1:
        raise GenpruneError(
            f"level is {level} and resamples is {resamples}, expected 0 < level < 1 and resamples >= 1."
        )
    generator = torch.Generator().manual_seed(seed)
    block = max(1, 10_000_000 // len(values))  # at most 80 MB of indices at a time
    drawn = []
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        picks = torch.randint(len(values), (rows, len(values)), generator=generator)
        drawn.append(statistic(values[picks]))  # (rows, N) -> (rows,)
    tail = (1 - level) / 2
    low, high = torch.cat(drawn).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(statistic(values).item(), low, high, level, len(values))


def paired_difference(
    candidate: Tensor, reference: Tensor, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of `candidate - reference` over pairs, with its bootstrap interval: pairs are resampled, not sides.

    Args:
        candidate, reference: one value a picture, shape `(N,)`; value i of both belongs to the same prompt and seed.
        resamples, level, seed: see `bootstrap_interval`.

    Raises:
        BadImages: the shapes differ, or see `bootstrap_interval`.
    """
    if candidate.shape != reference.shape:
        raise BadImages(
            f"the paired values have shapes {tuple(candidate.shape)} and {tuple(reference.shape)}, expected the same. "
            "Score both candidates on the same prompts and seeds."
        )
    difference = candidate.double().cpu() - reference.double().cpu()
    return bootstrap_interval(difference, mean, resamples, level, seed)
