"""LD-Pruner's score: how the statistics of final latents move when one operator is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from genprune.denoising.capture import capture_runs
from genprune.errors import GenpruneError
from genprune.families import denoiser
from genprune.layers.candidates import Candidate, applied
from genprune.sites import Sites


def statistics_distance(latents: Tensor, dense: Tensor, relative: bool = True) -> float:
    """Distance between the mean and the spread of two sets of latents, elementwise over the set:

        || mean_n Z0 - mean_n Z ||_2 + || std_n Z0 - std_n Z ||_2

    Args:
        latents, dense: shape `(m, ...)`, m >= 2, from the same noise and prompts.
        relative: each term over the norm of the dense one, so that models and terms compare.

    Reference:
        LD-Pruner (arXiv 2404.11936).
    """
    total = 0.0
    for statistic in (lambda z: z.mean(0), lambda z: z.std(0)):
        reference = statistic(dense.double())
        moved = float((reference - statistic(latents.double())).norm())
        total += moved / float(reference.norm().clamp_min(1e-12)) if relative else moved
    return total


class LatentStatistics:
    """Scores by whole trajectories of a pipeline: the same noise and prompts for every candidate, never decoded.

    Args:
        pipe: any pipeline that `capture_runs` can draw with; text to image, unconditional, or audio.
        sites: of its denoiser.
        prompts: one per sample.
        draw: arguments of `capture_runs`: samples, steps, seed, guidance_scale, batch_size, options.
    """

    def __init__(self, pipe, sites: Sites, prompts: Sequence[str] | None, draw: Mapping[str, Any]):
        self.pipe, self.sites, self.prompts, self.draw = pipe, sites, prompts, dict(draw)
        self._dense: Tensor | None = None

    @torch.no_grad()
    def latents(self) -> Tensor:
        """Final latents of all samples as the model is, shape `(m, ...)`, float32."""
        runs = capture_runs(self.pipe, self.prompts, keep=lambda index: False, **self.draw)
        return torch.cat([run.latents.float() for run in runs])

    def dense(self) -> Tensor:
        """Those of the unchanged model; drawn once. Raises `GenpruneError` for fewer than two."""
        if self._dense is None:
            self._dense = self.latents()
            if len(self._dense) < 2:
                raise GenpruneError(
                    "the spread of latents needs at least 2 samples, better 32 or more; 1 was drawn. Raise samples."
                )
        return self._dense

    def joint(self, candidates: Sequence[Candidate], what: str = "") -> float:
        """The score with all of these applied at once. Raises `GenpruneError` where latents are not finite."""
        dense = self.dense()
        with applied(denoiser(self.pipe), self.sites, candidates):
            latents = self.latents()
        if not torch.isfinite(latents).all():
            names = ", ".join(candidate.name for candidate in candidates[:3])
            raise GenpruneError(
                f"the latents under {names} are not finite; expected numbers. Score in float32 or bfloat16, or leave "
                "that operator out of the menu."
            )
        return statistics_distance(latents, dense)

    def alone(
        self, candidates: Sequence[Candidate], base: Sequence[Candidate] = (), what: str = "", progress: bool = False
    ) -> dict[str, float]:
        """The score of each candidate alone, on top of those in `base`."""
        from tqdm.auto import tqdm

        bar = tqdm(candidates, desc=what or "trajectories", unit="operator", disable=not progress)
        return {candidate.name: self.joint([*base, candidate]) for candidate in bar}
