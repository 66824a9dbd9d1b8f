"""Kernel distance between two sets of images, on Inception features (KID) or on any other extractor's."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from genprune.metrics.errors import BadImages
from genprune.metrics.extractors import FeatureExtractor, as_extractor
from genprune.metrics.fid import check_features
from genprune.metrics.inception import InceptionExtractor
from genprune.metrics.kernels import polynomial_kernel, row_sums, self_sums
from genprune.metrics.result import MetricResult


def kernel_distance(features_x: Tensor, features_y: Tensor, chunk: int = 1024) -> Tensor:
    """Unbiased squared MMD with KID's cubic kernel over *all* pairs, float64; may fall below 0 for equal sets.

    The usual KID averages this over random subsets; the average over every subset is this number, so it has the same
    expectation, no sampling noise of its own, and does not depend on the order of the images.

    Args:
        features_x: shape `(n, D)`, n >= 2.
        features_y: shape `(m, D)`, m >= 2; n and m may differ.
        chunk: rows of the kernel matrix at a time.

    Raises:
        BadImages: fewer than two rows, different widths, or a value that is not finite.

    Reference:
        Binkowski et al., Demystifying MMD GANs, arXiv 1801.01401; the estimator is Gretton et al. 2012, equation 3.
    """
    x, y = check_features(features_x, features_y)
    n, m = len(x), len(y)
    within_x = self_sums(polynomial_kernel, x, chunk).sum() / (n * (n - 1))
    within_y = self_sums(polynomial_kernel, y, chunk).sum() / (m * (m - 1))
    return within_x + within_y - 2 * row_sums(polynomial_kernel, x, y, chunk).sum() / (n * m)


def kernel_influences(features_x: Tensor, features_real: Tensor, chunk: int = 1024) -> Tensor:
    """How each candidate image moves its set's kernel distance to the real images: one value an image.

    First-order terms of the U-statistic (its Hajek projection): their mean is `kernel_distance` exactly, and
    resampling them resamples the distance to first order, real images held fixed. Two candidates drawn from the same
    prompts and seeds are compared by the paired bootstrap of the difference of their influences.

    Args:
        features_x: shape `(n, D)`, the candidate's images.
        features_real: shape `(m, D)`.

    Returns:
        Shape `(n,)`, float64.
    """
    x, y = check_features(features_x, features_real)
    n, m = len(x), len(y)
    projection = self_sums(polynomial_kernel, x, chunk) / (n - 1) - row_sums(polynomial_kernel, x, y, chunk) / m
    return kernel_distance(x, y, chunk) + 2 * (projection - projection.mean())


class KID(KernelInceptionDistance):
    """torchmetrics' KID, exact over all pairs unless subsets are asked for, with a named extractor.

    `update(images, real=True | False)`, `compute()` (value and standard error), `result()`, `reset()`. Features are
    kept (D doubles an image) and gathered over processes.

    Args:
        extractor: any `nn.Module`, see `as_extractor`. Default: `InceptionExtractor()`, fetched at construction.
        subsets: None for `kernel_distance` over all pairs, the default; a number for torchmetrics' mean over that many
            random subsets, as published KIDs do (100 subsets of 1,000).
        subset_size: images a subset.
        seed: of the subsets; the global random state is left alone.
        kwargs: torchmetrics' own, e.g. `reset_real_features`, `sync_on_compute`.
    """

    inception: FeatureExtractor

    def __init__(
        self,
        extractor: nn.Module | None = None,
        subsets: int | None = None,
        subset_size: int = 1000,
        seed: int = 0,
        **kwargs: Any,
    ):
        extractor = InceptionExtractor() if extractor is None else as_extractor(extractor)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*save all extracted features.*")
            super().__init__(
                feature=extractor, subsets=1 if subsets is None else subsets, subset_size=subset_size, **kwargs
            )
        self.exact = subsets is None
        self.seed = seed

    @property
    def name(self) -> str:
        return "KID" if self.inception.name == "inception-v3" else f"KID({self.inception.name})"

    def _features(self, side: str) -> Tensor:
        state = getattr(self, f"{side}_features")
        features = torch.cat(list(state)) if len(state) else torch.zeros(0, self.inception.num_features)
        if len(features) < 2:
            raise BadImages(
                f"{self.name} has seen {len(features)} {side} images, expected at least 2. "
                f"Call update(images, real={side == 'real'}) first."
            )
        return features

    def compute(self) -> tuple[Tensor, Tensor]:
        real, fake = self._features("real"), self._features("fake")
        self.count = len(fake)  # of all processes: the state holds only this process's afterwards
        if self.exact:
            influences = kernel_influences(fake, real)
            return influences.mean(), influences.std() / len(influences) ** 0.5
        if min(len(real), len(fake)) < self.subset_size:
            raise BadImages(
                f"subset_size is {self.subset_size}, expected at most the number of images ({len(real)} real, "
                f"{len(fake)} generated). Leave subsets=None for the exact distance at any number."
            )
        with torch.random.fork_rng(devices=[]):  # torchmetrics draws its subsets from the global CPU generator
            torch.manual_seed(self.seed)
            return super().compute()

    def result(self) -> MetricResult:
        """The value with its name, its standard error (the spread over subsets, with subsets) and the extractor."""
        value, error = self.compute()
        return MetricResult(
            self.name, value.item(), self.count, standard_error=error.item(), extractor=self.inception.card
        )
