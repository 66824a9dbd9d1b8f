"""First-order Taylor scores of gates as a method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from genprune.criteria import criterion_named
from genprune.denoising import calibration_batches
from genprune.errors import GenpruneError
from genprune.families import denoiser_slot
from genprune.methods.base import UnitMethod, check_range, check_whole, with_progress


@dataclass(frozen=True)
class Taylor(UnitMethod):
    """Units whose removal changes the loss least, to first order; needs prompts (a pipeline) or data (a model).

    Args:
        timesteps: how many, spread evenly over the training range, or which ones.
        samples: images that a pipeline draws to calibrate on; None: one per prompt, 16 without prompts.
        steps: denoising steps of the runs that draw them, >= 1.
        guidance_scale: of those runs; None: the pipeline's default.
        batch_size: rows a backward pass, >= 1.
        weights: one weight per timestep, in ascending order of timesteps; None: uniform.
        threshold: leave out timesteps whose mean loss is under this share of the largest, in [0, 1).

    Reference:
        Diff-Pruning (Fang et al., arXiv 2305.10924) for the threshold; 0.05 in pixel space, 0.1 in latent space.
    """

    timesteps: int | tuple[int, ...] = 8
    samples: int | None = None
    steps: int = 20
    guidance_scale: float | None = None
    batch_size: int = 4
    weights: tuple[float, ...] | None = None
    threshold: float = 0.0

    name: ClassVar[str] = "taylor"

    def __post_init__(self) -> None:
        for field in ("timesteps", "weights"):
            if isinstance(getattr(self, field), (list, tuple)):
                object.__setattr__(self, field, tuple(getattr(self, field)))
        super().__post_init__()
        if isinstance(self.timesteps, tuple):
            if not self.timesteps or len(set(self.timesteps)) != len(self.timesteps):
                raise GenpruneError(f"timesteps={self.timesteps}; expected different whole numbers, at least one.")
            for timestep in self.timesteps:
                check_whole("timesteps", timestep, 0)
        else:
            check_whole("timesteps", self.timesteps, 1)
        check_whole("steps", self.steps, 1)
        check_whole("batch_size", self.batch_size, 1)
        if self.samples is not None:
            check_whole("samples", self.samples, 1)
        if self.guidance_scale is not None:
            check_range("guidance_scale", self.guidance_scale, 0, 1000)
        for weight in self.weights or ():
            check_range("weights", weight, 0, float("inf"))
        check_range("threshold", self.threshold, 0, 0.999)

    def criterion(self):
        return criterion_named(self.name)(weights=self.weights, threshold=self.threshold)

    def calibration(self, target, prompts, data, loss_fn, options: Mapping[str, Any], progress: bool):
        batches = calibration_batches(
            target,
            prompts,
            data,
            loss_fn=loss_fn,
            timesteps=self.timesteps,
            samples=self.samples,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            batch_size=self.batch_size,
            seed=self.seed,
            **options,
        )
        return with_progress(batches, self._batches(target, prompts, data)) if progress else batches

    def _batches(self, target, prompts, data) -> int | None:
        """How many batches there will be, where that is known before."""
        if denoiser_slot(target) is None or data is not None:
            return len(data) if hasattr(data, "__len__") and denoiser_slot(target) is None else None
        samples = self.samples or (len(prompts) if prompts else 16)
        times = self.timesteps if isinstance(self.timesteps, int) else len(self.timesteps)
        return -(-samples // self.batch_size) * times
