"""Pictures along a run: the same prompts and noise by the dense pipeline and by the recovering one, as PNG grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from genprune.denoising.capture import takes_prompts
from genprune.errors import GenpruneError
from genprune.files import whole_file


class ValidationPictures:
    """Draws the grid of a step: the dense pipeline's pictures above the recovering one's, a column a picture.

    Args:
        teacher: the dense pipeline; it draws once.
        prompts: a picture each, times `images`.
        images: of each prompt, from noise of their own, which is the same at every step.
        steps: denoising steps a picture.
        options: more of the pipelines' call.
        folder: gets `step-000100.png`.
        trackers: of accelerate; those that take pictures get them too.
    """

    def __init__(
        self,
        teacher: Any,
        prompts: Sequence[str],
        images: int,
        steps: int,
        options: Mapping[str, Any],
        folder: Path,
        seed: int,
        trackers: Sequence[Any] = (),
    ) -> None:
        if not takes_prompts(teacher):
            raise GenpruneError(
                f"--validation_prompts are given, and {type(teacher).__name__} is not called with text; expected a "
                "text-to-image pipeline. Leave them out."
            )
        if images < 1:
            raise GenpruneError(f"--num_validation_images {images}; expected at least 1. Pass 4, say.")
        self.teacher, self.prompts, self.images, self.steps = teacher, list(prompts), images, steps
        self.options, self.folder, self.seed, self.trackers = dict(options), folder, seed, tuple(trackers)
        self._dense: list[Image.Image] = []

    def __call__(self, step: int, target: Any) -> dict[str, float]:
        """Draw and write; PSNR between the rows as a number for the curve."""
        if not self._dense:
            self._dense = self._drawn(self.teacher)
        drawn = self._drawn(target)
        with whole_file(self.folder / f"step-{step:06d}.png") as written:
            grid([self._dense, drawn]).save(written, format="PNG")
        pictures = np.stack([np.asarray(picture) for picture in drawn])  # (n, H, W, 3)
        for tracker in self.trackers:
            if hasattr(tracker, "log_images"):
                tracker.log_images({"validation": pictures}, step=step)
        return {"psnr_to_dense_db": psnr(pictures, np.stack([np.asarray(picture) for picture in self._dense]))}

    @torch.no_grad()
    def _drawn(self, pipe: Any) -> list[Image.Image]:
        drawn = []
        for prompt in self.prompts:
            for index in range(self.images):
                generator = torch.Generator("cpu").manual_seed(self.seed + index)
                called = pipe(prompt, num_inference_steps=self.steps, generator=generator, **self.options)
                drawn.append(called.images[0])
        return drawn


def grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of pictures of one size in one picture."""
    width, height = rows[0][0].size
    whole = Image.new("RGB", (width * max(map(len, rows)), height * len(rows)))
    for line, row in enumerate(rows):
        for column, picture in enumerate(row):
            whole.paste(picture, (column * width, line * height))
    return whole


def psnr(one: np.ndarray, other: np.ndarray, most: float = 100.0) -> float:
    """Mean PSNR of uint8 pictures `(n, H, W, 3)` in dB, at most `most`: that of equal pictures is infinite."""
    errors = np.square(one.astype(float) - other.astype(float)).mean(axis=(1, 2, 3))
    return float(np.minimum(10 * np.log10(255**2 / np.maximum(errors, 1e-12)), most).mean())
