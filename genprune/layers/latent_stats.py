"""LD-Pruner's score: how the statistics of final latents move when one operator is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from genprune.denoising.capture import takes_labels
from genprune.denoising.trajectory import draw_latents
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
        pipe: any pipeline that `draw_latents` can draw with: text to image, unconditional, or audio.
        sites: of its denoiser.
        prompts: text or class labels, repeated in order until there are `samples`; None for an unconditional pipeline.
        samples: trajectories, >= 2.
        seed: sample i starts from `seed + i`.
        batch_size: drawn together.
        options: of the pipeline's call: num_inference_steps, guidance_scale, height, ...

    Raises:
        GenpruneError: fewer than two samples.
    """

    def __init__(
        self,
        pipe,
        sites: Sites,
        prompts: Sequence[str] | None,
        *,
        samples: int,
        seed: int,
        batch_size: int,
        options: Mapping[str, Any],
    ):
        if samples < 2:
            raise GenpruneError(
                f"the spread of latents needs at least 2 samples, better 32 or more; got {samples}. Raise "
                "trajectories, or pass more prompts."
            )
        self.pipe, self.sites, self.prompts, self.samples = pipe, sites, prompts, samples
        self.seed, self.batch_size, self.options = seed, batch_size, dict(options)
        self._dense: Tensor | None = None

    @torch.no_grad()
    def latents(self) -> Tensor:
        """Final latents of all samples as the model is, shape `(m, ...)`, float32."""
        parts, labelled = [], takes_labels(self.pipe)
        for first in range(0, self.samples, self.batch_size):
            rows = range(first, min(first + self.batch_size, self.samples))
            prompts = self.prompts and [self.prompts[row % len(self.prompts)] for row in rows]
            seeds = [self.seed + row for row in rows]
            given = {"class_labels" if labelled else "prompts": prompts}
            parts.append(draw_latents(self.pipe, seeds=seeds, **given, **self.options).float())
        return torch.cat(parts)

    def dense(self) -> Tensor:
        """Those of the unchanged model; drawn once."""
        if self._dense is None:
            self._dense = self.latents()
        return self._dense

    def joint(self, candidates: Sequence[Candidate]) -> float:
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
