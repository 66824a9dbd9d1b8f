"""What depth is learned on: a pool of batches, and which of them an optimiser step takes."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from genprune.denoising.calibration import Batch, calibration_batches
from genprune.denoising.targets import forward_process
from genprune.errors import BadCalibrationData
from genprune.families import denoiser_slot
from genprune.masks.depth_settings import DepthTraining


class BatchPool:
    """Batches in another order every epoch; a function of seed and step alone, so that a resumed run sees the same.

    A pipeline's pictures are drawn once and noised to `settings.timesteps` random timesteps each. Of a bare model's
    data, a sequence is read batch by batch; anything else that can be iterated is read once, and held.

    Args:
        target, prompts, data, loss_fn: as `calibration_batches` takes them.
        options: keyword arguments of the pipeline's call.

    Raises:
        BadCalibrationData: prompts or data are missing, empty, or do not fit.
    """

    def __init__(
        self,
        target,
        settings: DepthTraining,
        seed: int,
        *,
        prompts: Sequence | None = None,
        data: Any = None,
        loss_fn: Callable | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.target, self.loss_fn, self.seed = target, loss_fn, seed
        self._own: Sequence | None = None
        if denoiser_slot(target) is None:
            if data is not None and not isinstance(data, Sequence):
                data = list(data)
            if not data:
                next(calibration_batches(target, prompts, data, loss_fn=loss_fn))  # raises, and says what to pass
            self._own = data
            return
        process = forward_process(target.scheduler)
        count = min(settings.timesteps, process.train_timesteps)
        drawn = random.Random(f"timesteps {seed}").sample(range(process.train_timesteps), count)
        self._held = list(
            calibration_batches(
                target,
                prompts,
                data,
                timesteps=sorted(drawn),
                samples=settings.samples,
                steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                batch_size=settings.batch_size,
                seed=seed,
                **(options or {}),
            )
        )
        if not self._held:
            raise BadCalibrationData(
                f"{type(target).__name__} drew no picture to train on; expected at least one. Pass samples=16."
            )

    def __len__(self) -> int:
        return len(self._held if self._own is None else self._own)

    def batch(self, number: int) -> Batch:
        """Batch `number` of the run, from 0: each once an epoch."""
        epoch, place = divmod(number, len(self))
        order = list(range(len(self)))
        random.Random(f"{self.seed} {epoch}").shuffle(order)
        if self._own is None:
            return self._held[order[place]]
        return next(calibration_batches(self.target, None, [self._own[order[place]]], loss_fn=self.loss_fn))
