"""What the drawn pictures say: each candidate against the reference, the real pictures, and its prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from genprune.bench.data import BenchData
from genprune.bench.run import load_image, load_latent
from genprune.metrics.bootstrap import Interval, bootstrap_interval, paired_difference
from genprune.metrics.clip import ClipExtractor
from genprune.metrics.clip_score import clip_scores
from genprune.metrics.cmmd import cmmd_distance
from genprune.metrics.extractors import FeatureExtractor, extract
from genprune.metrics.fid import frechet_distance
from genprune.metrics.floor import real_floor
from genprune.metrics.kid import kernel_distance, kernel_influences
from genprune.metrics.latent_error import latent_mse
from genprune.metrics.result import Floor
from genprune.metrics.signal_to_noise import psnr
from genprune.metrics.structural_similarity import ssim

Source = Callable[[int], Tensor]  # image number -> uint8 (3, H, W)
SceneScores = Callable[[Tensor, Sequence], Mapping[str, Tensor]]  # images, scenes -> name -> one value an image
CONTROLS = ("blank canvas", "mean image", "shuffled prompts")


@dataclass(frozen=True)
class Measurement:
    """One metric of one candidate.

    Attributes:
        candidate: its name, or one of `CONTROLS`.
        metric: its name, extractor included, e.g. `KID(lite0)`.
        value: the number.
        higher_is_better: how to read it.
        interval: 95 % bootstrap interval of the value, for means over images.
        difference: paired difference to the reference with its interval, where the metric has one value an image.
        floor: real against real, for set distances.
    """

    candidate: str
    metric: str
    value: float
    higher_is_better: bool
    interval: Interval | None = None
    difference: Interval | None = None
    floor: Floor | None = None

    def to_json(self) -> dict:
        return {
            "candidate": self.candidate,
            "metric": self.metric,
            "value": self.value,
            "higher_is_better": self.higher_is_better,
            "interval": self.interval and self.interval.to_json(),
            "difference": self.difference and self.difference.to_json(),
            "floor": self.floor and self.floor.to_json(),
        }


def compare_images(
    folders: Mapping[str, Path],
    data: BenchData,
    reference: str,
    *,
    extractors: Sequence[FeatureExtractor] = (),
    scene_scores: SceneScores | None = None,
    controls: bool = True,
    batch_size: int = 32,
    resamples: int = 2000,
    seed: int = 0,
) -> list[Measurement]:
    """Every metric of every candidate, the control rows last.

    Paired metrics (PSNR, SSIM, latent MSE) are against the reference candidate; set distances against the real
    pictures, beside their real-vs-real floor; CLIP score and the miniature's grades against the prompts.

    Args:
        folders: candidate -> folder that `draw_images` filled.
        data: prompts and real pictures.
        reference: the candidate that differences are against, usually `dense`.
        extractors: for set distances; a `ClipExtractor` also gives CMMD and CLIP score.
        scene_scores: grades images against `data.scenes`, per image.
        controls: add the rows `blank canvas`, `mean image` and `shuffled prompts`: what a broken model would score.
        batch_size: images at a time.
        resamples, seed: of the bootstrap, and of the floor's splits.
    """
    count = len(data.prompts)
    sources: dict[str, Source] = {
        name: (lambda index, folder=folder: load_image(folder, index)) for name, folder in folders.items()
    }
    if controls:
        sources |= _controls(sources[reference], count)
    setting = {"resamples": resamples, "seed": seed}
    found = _paired(sources, folders, reference, count, batch_size, setting)
    for extractor in extractors:
        features = {name: extract(extractor, _batches(source, count, batch_size)) for name, source in sources.items()}
        if data.real:
            size = tuple(sources[reference](0).shape[-2:])
            real = extract(extractor, data.real_batches(size, batch_size))
            found += _distances(features, real, reference, extractor, setting)
        if isinstance(extractor, ClipExtractor):
            texts = torch.cat([extractor.embed_texts(chunk).cpu() for chunk in _chunks(data.prompts, batch_size)])
            scores = {name: clip_scores(images, texts) for name, images in features.items()}
            found += _against_reference(f"CLIPScore({extractor.name})", scores, reference, setting)
    if scene_scores is not None and data.scenes is not None:
        for metric, scores in _graded(sources, data.scenes, scene_scores, batch_size).items():
            found += _against_reference(metric, scores, reference, setting)
    order = {name: place for place, name in enumerate(sources)}
    return sorted(found, key=lambda row: order[row.candidate])  # stable: metrics keep their order


def _chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _batches(source: Source, count: int, batch_size: int) -> Iterator[Tensor]:
    for chunk in _chunks(range(count), batch_size):
        yield torch.stack([source(index) for index in chunk])


def _controls(reference: Source, count: int) -> dict[str, Source]:
    total = sum(reference(index).double() for index in range(count))
    average = (total / count).round().to(torch.uint8)
    white = torch.full_like(average, 255)
    return {
        "blank canvas": lambda index: white,
        "mean image": lambda index: average,
        "shuffled prompts": lambda index: reference((index + 1) % count),  # right pictures, each for its neighbour
    }


def _paired(sources, folders, reference: str, count: int, batch_size: int, setting: dict) -> list[Measurement]:
    scores: dict[tuple[str, str, bool], list[Tensor]] = {}
    latents = load_latent(folders[reference], 0) is not None
    for chunk in _chunks(range(count), batch_size):
        base = torch.stack([sources[reference](index) for index in chunk])
        for name, source in sources.items():
            if name == reference:
                continue
            images = torch.stack([source(index) for index in chunk])
            scores.setdefault((name, f"PSNR to {reference} (dB)", True), []).append(psnr(images, base))
            scores.setdefault((name, f"SSIM to {reference}", True), []).append(ssim(images, base))
            if latents and name in folders and load_latent(folders[name], 0) is not None:
                pair = [torch.stack([load_latent(folders[n], i) for i in chunk]) for n in (name, reference)]
                scores.setdefault((name, f"latent MSE to {reference}", False), []).append(latent_mse(*pair))
    rows = []
    for (name, metric, higher), parts in scores.items():
        values = torch.cat(parts)
        interval = bootstrap_interval(values, **setting) if count > 1 else None
        rows.append(Measurement(name, metric, values.mean().item(), higher, interval=interval))
    return rows


def _against_reference(metric: str, scores: Mapping[str, Tensor], reference: str, setting: dict) -> list[Measurement]:
    """A metric with one value an image, higher is better: its mean, and the paired difference to the reference."""
    rows = []
    for name, values in scores.items():
        many = len(values) > 1
        difference = paired_difference(values, scores[reference], **setting) if many and name != reference else None
        interval = bootstrap_interval(values, **setting) if many else None
        rows.append(Measurement(name, metric, values.double().mean().item(), True, interval, difference))
    return rows


def _distances(
    features: Mapping[str, Tensor], real: Tensor, reference: str, extractor: FeatureExtractor, setting: dict
) -> list[Measurement]:
    """KID with its paired difference, then FD, then CMMD for a CLIP; each with the floor at the same number."""
    card = extractor.card
    official = card.official and card.name == "inception-v3"
    fd_name, kid_name = ("FID", "KID") if official else (f"FD({card.name})", f"KID({card.name})")
    distances = {kid_name: kernel_distance, fd_name: frechet_distance}
    if isinstance(extractor, ClipExtractor):
        name = "CMMD" if card.official else f"MMD-RBF({card.name})"
        distances[name] = cmmd_distance
    count = len(features[reference])
    if count < 2 or len(real) < 4:
        return []
    rows = []
    influences = {name: kernel_influences(own, real) for name, own in features.items()}
    for metric, distance in distances.items():
        floor = real_floor(real, distance, size=min(count, len(real) // 2), seed=setting["seed"])
        for name, own in features.items():
            if name == "shuffled prompts":
                continue  # the same set of pictures as the reference's
            difference = None
            if metric == kid_name and name != reference:
                difference = paired_difference(influences[name], influences[reference], **setting)
            value = distance(own, real).item()
            rows.append(Measurement(name, metric, value, False, difference=difference, floor=floor))
    return rows


def _graded(sources, scenes: Sequence, scene_scores: SceneScores, batch_size: int) -> dict[str, dict[str, Tensor]]:
    """Metric -> candidate -> one value an image."""
    graded: dict[str, dict[str, list[Tensor]]] = {}
    for name, source in sources.items():
        for chunk in _chunks(range(len(scenes)), batch_size):
            images = torch.stack([source(index) for index in chunk])
            for metric, values in scene_scores(images, [scenes[index] for index in chunk]).items():
                graded.setdefault(metric, {}).setdefault(name, []).append(values.double().cpu())
    return {
        metric: {name: torch.cat(parts) for name, parts in candidates.items()} for metric, candidates in graded.items()
    }
