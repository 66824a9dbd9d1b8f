"""The miniature's grader as an instrument: per-image scores, and its features for set distances."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from genprune.metrics.errors import MissingWeights
from genprune.metrics.extractors import FeatureExtractor
from genprune.metrics.images import resize, to_uint8, to_unit_floats

SIDE = 64  # px, the only size that the grader reads


def grader_extractor(grader: nn.Module | None = None) -> FeatureExtractor:
    """Penultimate features of the grader, 128-d: results say `KID(miniature-grader)`.

    Args:
        grader: default: the embedded one.

    Raises:
        MissingWeights: the grader is not in this copy of the package.
    """
    return FeatureExtractor(
        _grader(grader), "miniature-grader", image_size=SIDE, features=lambda model, images: model.features(images)
    )


def scene_grader(grader: nn.Module | None = None) -> Callable[[Tensor, Sequence], Mapping[str, Tensor]]:
    """A function from images `(B, 3, H, W)` and their scenes to one score in [0, 1] an image and name.

    `grade(all)`: everything that the caption says is in the picture (0 or 1). `grade(attributes)`: the share of what
    it says. `grade(object)` and `grade(background)`: that alone.
    """
    grader = _grader(grader)

    @torch.no_grad()
    def scores(images: Tensor, scenes: Sequence) -> dict[str, Tensor]:
        from genprune.miniature.grader import labels, read, said

        images = resize(to_unit_floats(images), SIDE).clamp(0, 1) if images.shape[-1] != SIDE else to_uint8(images)
        truth = labels(scenes)
        found, mentioned = read(images, grader), said(truth)
        right = torch.stack([(found[name] == truth[name]) & mentioned[name] for name in truth]).double()  # (A, B)
        asked = torch.stack([mentioned[name] for name in truth]).double()
        share = right.sum(0) / asked.sum(0)
        return {
            "grade(all)": (share == 1).double(),
            "grade(attributes)": share,
            "grade(object)": (found["object"] == truth["object"]).double(),
            "grade(background)": (found["background"] == truth["background"]).double(),
        }

    return scores


def _grader(grader: nn.Module | None) -> nn.Module:
    if grader is not None:
        return grader
    from genprune import miniature

    try:
        return miniature.load_grader()
    except FileNotFoundError as error:
        raise MissingWeights(
            f"{error}. To compare without it, pass prompts of your own and, with real pictures, extractors=['lite0']."
        ) from error
