"""A look at the plan that the logits stand for now: the same selection as the exported plan, as 0/1 gates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from genprune.denoising.trajectory import draw_latents
from genprune.masks.batches import TrajectoryBatch
from genprune.masks.objectives import DenseLatents, arguments, row_losses
from genprune.masks.settings import MaskTraining

if TYPE_CHECKING:
    from genprune.masks.step_gates import LearnedGates
    from genprune.masks.training import MaskProblem


class PlanLook:
    """Validation prompts with noise of their own, and the dense pipeline's latents for them.

    Guidance is that of the training, the middle of its range.

    Args:
        count: prompts, from the end of the list; images of an unconditional pipeline.
    """

    def __init__(
        self, problem: MaskProblem, dense: DenseLatents, settings: MaskTraining, count: int, seed: int
    ) -> None:
        self.problem, self.dense = problem, dense
        prompts = problem.prompts[-count:] if problem.prompts is not None else None
        rows = count if prompts is None else len(prompts)
        seeds = tuple(2**31 + seed * 1_000_003 + row for row in range(rows))
        guidance = settings.guidance_scale
        if isinstance(guidance, tuple):
            guidance = sum(guidance) / 2
        self.batch = TrajectoryBatch(prompts, seeds, rows, guidance, key=("validation",))

    @torch.no_grad()
    def loss(self, logits: Mapping[str, Tensor], gates: LearnedGates) -> float:
        """Mean squared distance of the gated pipeline's final latents from the dense ones, over their squared norm."""
        gates.open()
        dense = self.dense.of(self.batch)
        gates.fix(self.problem.select(logits))
        latents = draw_latents(self.problem.pipe, **arguments(self.problem.pipe, self.batch, self.dense.options))
        gates.open()
        return float(row_losses(latents, dense.to(latents.device), "rel_l2").mean())
