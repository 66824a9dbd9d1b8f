"""A look at the plan that the logits stand for now: the same selection as the exported plan, as 0/1 gates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from genprune.denoising.trajectory import draw_latents
from genprune.masks.batches import TrajectoryBatch
from genprune.masks.objectives import DenseLatents, arguments, row_losses

if TYPE_CHECKING:
    from genprune.masks.step_gates import LearnedGates
    from genprune.masks.training import MaskProblem


class PlanLook:
    """Validation prompts with noise of their own, and the dense pipeline's latents for them.

    Args:
        count: prompts, from the end of the list; images of an unconditional pipeline.
    """

    def __init__(self, problem: MaskProblem, dense: DenseLatents, count: int, seed: int, loss: str) -> None:
        self.problem, self.dense, self.loss_name = problem, dense, loss
        prompts = problem.prompts[-count:] if problem.prompts is not None else None
        rows = count if prompts is None else len(prompts)
        seeds = tuple(2**31 + seed * 1_000_003 + row for row in range(rows))
        self.batch = TrajectoryBatch(prompts, seeds, rows, key=("validation",))

    @torch.no_grad()
    def loss(self, logits: Mapping[str, Tensor], gates: LearnedGates) -> float:
        """Mean distance of the gated pipeline's latents from the dense ones."""
        gates.open()
        dense = self.dense.of(self.batch)
        gates.fix(self.problem.select(logits))
        latents = draw_latents(self.problem.pipe, **arguments(self.problem.pipe, self.batch, self.dense.options))
        gates.open()
        return float(row_losses(latents, dense.to(latents.device), self.loss_name).mean())
