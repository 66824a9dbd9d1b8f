"""What masks are learned by: how far the masked pipeline's result is from the dense one's on the same noise."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genprune.denoising.capture import CallRecorder
from genprune.denoising.trajectory import draw_latents
from genprune.errors import GenpruneError
from genprune.families import denoiser
from genprune.masks.batches import TrajectoryBatch
from genprune.masks.settings import MaskTraining
from genprune.masks.step_gates import LearnedGates


def row_losses(result: Tensor, dense: Tensor, loss: str) -> Tensor:
    """Distance of each row of `(rows, ...)`, shape `(rows,)`, float32.

    `rel_l2` is `|r - d|^2 / |d|^2`, which has no scale; `mse` and `l1` are means over a row.
    """
    result, dense = result.float().flatten(1), dense.float().flatten(1)
    difference = result - dense
    if loss == "rel_l2":
        return difference.square().sum(1) / dense.square().sum(1).clamp(min=1e-12)
    return difference.square().mean(1) if loss == "mse" else difference.abs().mean(1)


class DenseLatents:
    """Final latents of the unmasked pipeline; those of batches that come again are kept on the CPU.

    Args:
        pipe: a stock pipeline; its gates, if any are attached, must be set to `None`-like ones by the caller.
        options: keyword arguments of the pipeline's call.
    """

    def __init__(self, pipe, options: Mapping[str, Any]) -> None:
        self.pipe, self.options = pipe, dict(options)
        self.kept: dict[tuple, Tensor] = {}

    @torch.no_grad()
    def of(self, batch: TrajectoryBatch) -> Tensor:
        """Shape `(rows, ...)`."""
        if batch.key is not None and batch.key in self.kept:
            return self.kept[batch.key]
        latents = draw_latents(self.pipe, **arguments(self.pipe, batch, self.options)).detach()
        if batch.key is not None:
            self.kept[batch.key] = latents.cpu()
        return latents


def arguments(pipe, batch: TrajectoryBatch, options: Mapping[str, Any]) -> dict[str, Any]:
    """What `draw_latents` takes for a batch."""
    given = dict(options) | {"seeds": batch.seeds}
    if batch.guidance_scale is not None:
        # FLUX has two: the one that its denoiser embeds, and true guidance by a second call
        embedded = getattr(denoiser(pipe).config, "guidance_embeds", False)
        name = "true_cfg_scale" if "true_cfg_scale" in given and not embedded else "guidance_scale"
        given[name] = batch.guidance_scale
    if batch.prompts is None:
        return given
    if isinstance(batch.prompts[0], int):
        return given | {"class_labels": list(batch.prompts)}
    return given | {"prompts": list(batch.prompts)}


def trajectory_loss(
    pipe, gates: LearnedGates, dense: DenseLatents, batch: TrajectoryBatch, settings: MaskTraining
) -> Tensor:
    """The loss of this process's rows over the rows of all processes: a scalar with a graph to the logits.

        L = mean_rows d(F(z_T, y), F_mask(z_T, y))

    Reference:
        EcoDiff (arXiv 2412.02852): the reconstruction term, through the whole chain.
    """
    gates.open()
    target = dense.of(batch)
    latents = draw_latents(
        pipe,
        gates=gates,
        activation_memory=settings.activation_memory,
        block_checkpointing=settings.block_checkpointing,
        **arguments(pipe, batch, dense.options),
    )
    return row_losses(latents, target.to(latents.device), settings.loss).sum() / batch.rows


def per_step_loss(
    pipe, gates: LearnedGates, dense: DenseLatents, batch: TrajectoryBatch, settings: MaskTraining
) -> Tensor:
    """The ablation: distance of the denoiser's outputs at one step of the dense chain, on the dense chain's inputs.

    As many calls are made as `denoising_steps` allow for the cost of one trajectory: all of them.
    """
    gates.open()
    model = denoiser(pipe)
    with torch.no_grad(), CallRecorder(model, device=next(model.parameters()).device) as recorder:
        draw_latents(pipe, **arguments(pipe, batch, dense.options))
    if not recorder.calls:
        raise GenpruneError(f"{type(pipe).__name__} did not call its denoiser; expected at least one step.")
    index = random.Random(f"{gates.seed} {gates.draw}").randrange(len(recorder.calls))
    call = recorder.calls[index]
    gates.set_step(index)
    prediction = model(**call.inputs, return_dict=False)[0]
    return row_losses(prediction, call.output, settings.loss).mean() * len(batch.seeds) / batch.rows


OBJECTIVES = {"trajectory": trajectory_loss, "per_step": per_step_loss}
