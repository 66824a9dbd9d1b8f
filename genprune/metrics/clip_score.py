"""CLIP score: how well each image fits its caption, through open_clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from genprune.metrics.clip import ClipExtractor, open_clip_extractor
from genprune.metrics.errors import BadImages
from genprune.metrics.result import MetricResult


def clip_scores(image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
    """`100 * max(cos(image, caption), 0)` for each pair, shape `(B,)`, float64, in [0, 100].

    Args:
        image_embeddings: shape `(B, D)`, any length.
        text_embeddings: shape `(B, D)`, row i belongs to image i.

    Raises:
        BadImages: the shapes differ.

    Reference:
        Hessel et al., CLIPScore: A Reference-free Evaluation Metric for Image Captioning, arXiv 2104.08718, equation 1
        with w = 100, as torchmetrics and the text-to-image literature report it.
    """
    if image_embeddings.ndim != 2 or image_embeddings.shape != text_embeddings.shape:
        raise BadImages(
            f"image and caption embeddings have shapes {tuple(image_embeddings.shape)} and "
            f"{tuple(text_embeddings.shape)}, expected the same (batch, D). Pass one caption per image."
        )
    cosine = torch.cosine_similarity(image_embeddings.double(), text_embeddings.double(), dim=-1)
    return 100 * cosine.clamp(min=0)


class CLIPScore(Metric):
    """Mean CLIP score. `update(images, captions)`, `compute()`, `result()`, `reset()`; sums over processes.

    Args:
        extractor: a `ClipExtractor`. Default: OpenAI's CLIP ViT-L/14 through open_clip, fetched at construction.
        kwargs: torchmetrics' own.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    def __init__(self, extractor: ClipExtractor | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.extractor = open_clip_extractor("ViT-L-14", "openai") if extractor is None else extractor
        if not hasattr(self.extractor, "embed_texts"):
            raise BadImages(
                f"the extractor '{getattr(self.extractor, 'name', type(self.extractor).__name__)}' cannot embed "
                "captions, expected a ClipExtractor. Build one with open_clip_extractor(name, pretrained)."
            )
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def name(self) -> str:
        return f"CLIPScore({self.extractor.name})"

    def scores(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """One score an image, shape `(B,)`; the state is left alone."""
        texts = self.extractor.embed_texts(captions)
        return clip_scores(self.extractor(images), texts)

    def update(self, images: Tensor, captions: Sequence[str]) -> None:
        scores = self.scores(images, captions)
        self.total += scores.sum().to(self.total.device)
        self.count += len(scores)

    def compute(self) -> Tensor:
        if self.count == 0:
            raise BadImages(f"{self.name} has seen no images, expected at least 1. Call update(images, captions).")
        self.images = int(self.count)  # of all processes: the state holds only this process's afterwards
        return self.total / self.count

    def result(self) -> MetricResult:
        """The mean with its name, the number of images and the CLIP model."""
        return MetricResult(self.name, self.compute().item(), self.images, extractor=self.extractor.card)
