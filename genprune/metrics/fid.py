"""Frechet distance between two sets of images, on Inception features (FID) or on any other extractor's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from genprune.metrics.errors import BadImages
from genprune.metrics.extractors import FeatureExtractor, as_extractor
from genprune.metrics.inception import InceptionExtractor
from genprune.metrics.result import MetricResult


def frechet_distance(features_x: Tensor, features_y: Tensor) -> Tensor:
    """Frechet distance of the Gaussians fitted to two sets of features, in float64, >= 0.

    `|mx - my|^2 + tr(Cx + Cy - 2 (Cx Cy)^(1/2))`. The last trace is the nuclear norm of `Cx^(1/2) Cy^(1/2)`, which is
    also that of the centred features' `X Y^T / sqrt((n-1)(m-1))`: exact for singular covariances, and a small matrix
    when there are fewer images than features.

    Args:
        features_x: shape `(n, D)`, n >= 2.
        features_y: shape `(m, D)`, m >= 2.

    Raises:
        BadImages: fewer than two rows, different widths, or a value that is not finite.

    Reference:
        Heusel et al., GANs Trained by a Two Time-Scale Update Rule, arXiv 1706.08500, equation 6.
    """
    x, y = check_features(features_x, features_y)
    if min(len(x), len(y)) >= x.shape[1]:
        return frechet_distance_from_moments(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T))
    mean_gap = (x.mean(0) - y.mean(0)).square().sum()
    x, y = (x - x.mean(0)) / math.sqrt(len(x) - 1), (y - y.mean(0)) / math.sqrt(len(y) - 1)
    cross = torch.linalg.svdvals(x @ y.T).sum()  # (n, m)
    return (mean_gap + x.square().sum() + y.square().sum() - 2 * cross).clamp(min=0)


def frechet_distance_from_moments(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> Tensor:
    """The same from means of shape `(D,)` and covariances of shape `(D, D)`, float64."""
    roots = []
    for cov in (cov_x, cov_y):
        values, vectors = torch.linalg.eigh(torch.atleast_2d(cov))
        roots.append(vectors * values.clamp(min=0).sqrt() @ vectors.T)
    cross = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    traces = torch.atleast_2d(cov_x).trace() + torch.atleast_2d(cov_y).trace()
    return ((mean_x - mean_y).square().sum() + traces - 2 * cross).clamp(min=0)


def check_features(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both feature sets in float64, or `BadImages` when a set distance between them has no meaning."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise BadImages(
            f"the features have shapes {tuple(x.shape)} and {tuple(y.shape)}, expected (n, D) and (m, D). "
            "Extract both with the same extractor."
        )
    if min(len(x), len(y)) < 2:
        raise BadImages(f"a set distance needs at least 2 images on each side, got {len(x)} and {len(y)}.")
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise BadImages("the features hold NaN or infinity, expected finite numbers. Run the extractor in float32.")
    return x.double(), y.double()


class FID(FrechetInceptionDistance):
    """torchmetrics' FID, with an extractor that owns its input and is named in the result.

    `update(images, real=True | False)`, `compute()` (a float64 scalar), `result()`, `reset()`. Sums of features and of
    their outer products are kept in float64 and summed over processes.

    Args:
        extractor: any `nn.Module`, see `as_extractor`. Default: `InceptionExtractor()`, fetched at construction.
        kwargs: torchmetrics' own, e.g. `reset_real_features`, `sync_on_compute`.
    """

    inception: FeatureExtractor

    def __init__(self, extractor: nn.Module | None = None, **kwargs: Any):
        extractor = InceptionExtractor() if extractor is None else as_extractor(extractor)
        super().__init__(feature=extractor, **kwargs)

    @property
    def name(self) -> str:
        return "FID" if self.inception.name == "inception-v3" else f"FD({self.inception.name})"

    def compute(self) -> Tensor:
        moments = []
        for side in ("real", "fake"):
            count = getattr(self, f"{side}_features_num_samples")
            if count < 2:
                raise BadImages(
                    f"{self.name} has seen {int(count)} {side} images, expected at least 2. "
                    f"Call update(images, real={side == 'real'}) first."
                )
            mean = getattr(self, f"{side}_features_sum") / count
            outer = getattr(self, f"{side}_features_cov_sum")
            self.count = int(
                count
            )  # generated images of all processes: the state holds only this process's afterwards
            moments += [mean, (outer - count * torch.outer(mean, mean)) / (count - 1)]
        return frechet_distance_from_moments(*moments)

    def result(self) -> MetricResult:
        """The value with its name, the number of generated images and the extractor."""
        value = self.compute().item()
        return MetricResult(self.name, value, self.count, extractor=self.inception.card)
