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

    `rel_l2` is `|r - d|^2 / |d|^2`, which has no scale, and `rel_norm` its square root, in which few bad rows weigh
    less; `mse` and `l1` are means over a row.
    """
    result, dense = result.float().flatten(1), dense.float().flatten(1)
    difference = result - dense
    if loss in ("rel_l2", "rel_norm"):
        relative = difference.square().sum(1) / dense.square().sum(1).clamp(min=1e-12)
        return relative if loss == "rel_l2" else (relative + 1e-12).sqrt()  # no infinite slope at a perfect row
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
    def of(self, batch: TrajectoryBatch, whole_chain: bool = False) -> Tensor:
        """Shape `(rows, ...)`, or `(steps, rows, ...)` of the whole chain."""
        key = None if batch.key is None else (*batch.key, whole_chain)
        if key in self.kept:
            return self.kept[key]
        given = arguments(self.pipe, batch, self.options)
        latents = draw_latents(self.pipe, whole_chain=whole_chain, **given).detach()
        if key is not None:
            self.kept[key] = latents.cpu()
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
    latents, target = _latents(pipe, gates, dense, batch, settings, whole_chain=False)
    return row_losses(latents, target, settings.loss).sum() / batch.rows


def chain_loss(
    pipe, gates: LearnedGates, dense: DenseLatents, batch: TrajectoryBatch, settings: MaskTraining
) -> Tensor:
    """As `trajectory_loss`, of the latents after every solver step: the mean over the chain.

        L = mean_rows mean_k d(z_k, z_k,mask)

    Every step is told what it did wrong, also where late steps mend or multiply an early error.
    """
    latents, target = _latents(pipe, gates, dense, batch, settings, whole_chain=True)
    losses = row_losses(latents.flatten(0, 1), target.flatten(0, 1), settings.loss)  # (steps * rows,)
    return losses.sum() / (len(latents) * batch.rows)


def _latents(
    pipe, gates: LearnedGates, dense: DenseLatents, batch: TrajectoryBatch, settings: MaskTraining, whole_chain: bool
) -> tuple[Tensor, Tensor]:
    """Latents of the masked pipeline, with their graph, and of the dense one."""
    gates.open()
    target = dense.of(batch, whole_chain)
    latents = draw_latents(
        pipe,
        gates=gates,
        activation_memory=settings.activation_memory,
        block_checkpointing=settings.block_checkpointing,
        whole_chain=whole_chain,
        **arguments(pipe, batch, dense.options),
    )
    return latents, target.to(latents.device)


def per_step_loss(
    pipe, gates: LearnedGates, dense: DenseLatents, batch: TrajectoryBatch, settings: MaskTraining
) -> Tensor:
    """The ablation: distance of the denoiser's outputs at one step of the dense chain, on the dense chain's inputs.

    The dense chain is drawn whole, one of its calls is picked at random, and that one alone has a graph.
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


OBJECTIVES = {"trajectory": trajectory_loss, "chain": chain_loss, "per_step": per_step_loss}
