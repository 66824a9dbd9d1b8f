"""CMMD: Gaussian-kernel distance between two sets of CLIP image embeddings."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from genprune.metrics.clip import open_clip_extractor
from genprune.metrics.errors import BadImages
from genprune.metrics.extractors import as_extractor
from genprune.metrics.fid import check_features
from genprune.metrics.kernels import gaussian_kernel, row_sums
from genprune.metrics.result import MetricResult

SIGMA = 10.0
SCALE = 1000.0


def cmmd_distance(features_x: Tensor, features_y: Tensor, sigma: float = SIGMA, chunk: int = 1024) -> Tensor:
    """1000 times the biased squared MMD with a Gaussian kernel, float64, >= 0 and 0 for equal sets.

    Args:
        features_x: embeddings of shape `(n, D)`; CMMD's are CLIP's, scaled to unit length.
        features_y: shape `(m, D)`.
        sigma: width of the kernel; the published metric uses 10.
        chunk: rows of the kernel matrix at a time.

    Raises:
        BadImages: fewer than two rows, different widths, or a value that is not finite.

    Reference:
        Jayasumana et al., Rethinking FID: Towards a Better Evaluation Metric for Image Generation, arXiv 2401.09603.
    """
    x, y = check_features(features_x, features_y)
    kernel = gaussian_kernel(sigma)
    within_x = row_sums(kernel, x, x, chunk).sum() / len(x) ** 2
    within_y = row_sums(kernel, y, y, chunk).sum() / len(y) ** 2
    between = row_sums(kernel, x, y, chunk).sum() / (len(x) * len(y))
    return SCALE * (within_x + within_y - 2 * between)


class CMMD(Metric):
    """`update(images, real=True | False)`, `compute()` (a float64 scalar), `result()`, `reset()`.

    Args:
        extractor: any `nn.Module` of embeddings, see `as_extractor`. Default: OpenAI's CLIP ViT-L/14 at 336 px through
            open_clip, fetched at construction (0.9 GB).
        kwargs: torchmetrics' own, e.g. `sync_on_compute`.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False

    def __init__(self, extractor: nn.Module | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.extractor = (
            open_clip_extractor("ViT-L-14-336", "openai") if extractor is None else as_extractor(extractor)
        )
        self.add_state("real", default=[], dist_reduce_fx="cat")
        self.add_state("fake", default=[], dist_reduce_fx="cat")

    @property
    def name(self) -> str:
        # the C stands for CLIP: on another embedding it is a Gaussian-kernel MMD and says so
        return "CMMD" if self.extractor.name == "ViT-L-14-336/openai" else f"MMD-RBF({self.extractor.name})"

    def update(self, images: Tensor, real: bool) -> None:
        (self.real if real else self.fake).append(self.extractor(images))

    def _features(self, side: str) -> Tensor:
        state = getattr(self, side)
        if isinstance(state, list) and not state:
            raise BadImages(
                f"{self.name} has seen no {side} images, expected at least 2. "
                f"Call update(images, real={side == 'real'}) first."
            )
        return dim_zero_cat(state)

    def compute(self) -> Tensor:
        fake, real = self._features("fake"), self._features("real")
        self.count = len(fake)  # of all processes: the state holds only this process's afterwards
        return cmmd_distance(fake, real)

    def result(self) -> MetricResult:
        """The value with its name, the number of generated images and the extractor."""
        value = self.compute().item()
        return MetricResult(self.name, value, self.count, extractor=self.extractor.card)
