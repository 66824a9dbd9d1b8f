"""What a candidate's pictures are worth: paired with the dense pipeline's, graded, and as a set."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from genprune import miniature
from genprune.bench.grading import grader_extractor, scene_grader
from genprune.metrics import bootstrap_interval, kernel_distance, paired_difference
from genprune.metrics.extractors import extract
from genprune.metrics.signal_to_noise import psnr
from genprune.metrics.structural_similarity import ssim

TEST_SEED = 20  # of the test scenes and of the noise
REAL = 1024  # other test scenes, for the set distance


@dataclass
class Judge:
    """The test captions of a comparison, the dense pipeline's pictures for them, and the instruments."""

    count: int
    scenes: list = field(init=False, repr=False)
    prompts: list[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.scenes = miniature.scenes("test", self.count, TEST_SEED)
        self.prompts = [miniature.caption(scene) for scene in self.scenes]
        self.extractor, self.grade = grader_extractor(), scene_grader()
        others = miniature.scenes("test", REAL, TEST_SEED, start=self.count)
        real = torch.stack([torch.from_numpy(miniature.render(scene)).permute(2, 0, 1) for scene in others])
        self.real = extract(self.extractor, real)

    def figures(self, pictures: Tensor, latents: Tensor, dense: Dense | None) -> dict:
        """Of uint8 pictures `(n, 3, 64, 64)` and their latents.

        Returns:
            `all_right` and `kid`; and against `dense`: `latent_error` (squared distance over squared norm), `psnr`,
            `ssim`, and the paired difference in `all_right`; each mean with its 95 % bootstrap interval.
        """
        right = self.grade(pictures, self.scenes)["grade(all)"].double()
        result = {
            "all_right": _interval(right),
            "kid": float(kernel_distance(extract(self.extractor, pictures), self.real)),
        }
        if dense is None:
            return result
        error = (latents - dense.latents).flatten(1).square().sum(1) / dense.latents.flatten(1).square().sum(1)
        result |= {
            "latent_error": _interval(error.double()),
            "psnr": _interval(psnr(pictures, dense.pictures).double().clamp(max=100)),
            "ssim": _interval(ssim(pictures, dense.pictures).double()),
            "all_right_less_dense": paired_difference(right, dense.right).to_json(),
        }
        return result


@dataclass(frozen=True)
class Dense:
    """What candidates are compared with."""

    latents: Tensor
    pictures: Tensor
    right: Tensor


def _interval(values: Tensor) -> dict:
    return bootstrap_interval(values).to_json()
