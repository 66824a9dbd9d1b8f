"""Running a stock pipeline's denoiser: what it is called with, and noised inputs with their targets."""

from __future__ import annotations

from genprune.denoising.batches import DenoisingBatch, ImageBatch, LossBatch
from genprune.denoising.calibration import calibration_batches
from genprune.denoising.capture import DenoiserCall, Run, capture_runs
from genprune.denoising.checkpointing import StepGates
from genprune.denoising.targets import forward_process
from genprune.denoising.trajectory import draw_latents

__all__ = [
    "DenoiserCall",
    "DenoisingBatch",
    "ImageBatch",
    "LossBatch",
    "Run",
    "StepGates",
    "calibration_batches",
    "capture_runs",
    "draw_latents",
    "forward_process",
]
