"""`train_router`: codes and the predictor that routes prompts to them, learned together (APTP)."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genprune.costs import SiteCosts, site_costs
from genprune.cutting import plan_base
from genprune.denoising.switches import blocks_checkpointed
from genprune.errors import GenpruneError
from genprune.families import OperatingPoint, denoiser
from genprune.files import whole_file
from genprune.masks.checkpoints import checkpoints
from genprune.plan import PruningPlan
from genprune.planning import with_latency
from genprune.recovery.accelerators import accelerator_of, check_accelerator
from genprune.recovery.models import on_device, teaching
from genprune.recovery.pairing import block_lists
from genprune.recovery.pipeline_data import cache_folder, pipeline_data
from genprune.routers import assignment
from genprune.routers.architecture import ArchitectureSpace
from genprune.routers.codes import budget_shift, code_plans, shares_of, usage_of
from genprune.routers.predictor import ArchitecturePredictor
from genprune.routers.settings import APTP
from genprune.routers.timing import module_times, timed_costs
from genprune.routers.training_checkpoints import load_checkpoint, save_checkpoint
from genprune.routers.training_setup import (
    budget_point,
    budget_quantity,
    checked_request,
    data_settings,
    first_codes,
    noise_boundaries,
    space_and_start,
    training_notes,
)
from genprune.routers.training_step import RouterModel, RouterTraining
from genprune.scores import Scores

logger = logging.getLogger(__name__)
CURVE, TIMES = "curve.json", "module_times.json"


@dataclass(frozen=True)
class LearnedCodes:
    """What a training found, before it is a router.

    Attributes:
        space, predictor, codes: see `ArchitectureSpace`; codes are logits `(K, D)`, the predictor is None where noise
            levels choose.
        shift: what moves all codes to the budget.
        usage: share of the prompts (of the sampler's steps) that goes to each code.
        plans: one a code.
        boundaries: between noise levels, ascending; empty for prompts.
        embeddings: of the distinct prompts, `(prompts, dim)`; None for noise levels.
        bias: what balances the routes over the training prompts, `(K,)`.
        curve: one record a step.
        notes: what was trained on, as JSON.
    """

    space: ArchitectureSpace = field(repr=False)
    predictor: ArchitecturePredictor | None = field(repr=False)
    codes: Tensor = field(repr=False)
    shift: float
    usage: list[float]
    plans: list[PruningPlan] = field(repr=False)
    boundaries: tuple[float, ...]
    embeddings: Tensor | None = field(repr=False)
    bias: Tensor | None = field(repr=False)
    curve: list[dict[str, Any]] = field(repr=False)
    notes: dict[str, Any] = field(repr=False)


@torch.inference_mode(False)
@torch.enable_grad()
def train_router(
    pipe: Any,
    settings: APTP,
    *,
    prompts: Sequence[str],
    data: Any = None,
    scores: Scores | PruningPlan | None = None,
    encoder: Any = None,
    operating_point: OperatingPoint | Mapping[str, int] | None = None,
    pipeline_options: Mapping[str, Any] | None = None,
    output_dir: str | os.PathLike | None = None,
    resume: bool = False,
    checkpointing_steps: int = 250,
    accelerator: Any = None,
    log_with: str | None = None,
    progress: bool = True,
) -> Any:
    """Learn K architecture codes and, for prompts, the router to them. The pipeline is not changed.

    Under `accelerate launch` every process takes its own rows; n processes equal one with n times the batch.

    Args:
        pipe: a stock, dense text-to-image pipeline.
        settings: how.
        prompts: of the training pictures; repeated ones count as often as they occur.
        data: clean latents `(n, C, h, w)`, images `(n, 3, H, W)` in [0, 1] or PIL images, one a prompt; None: the
            pipeline draws them, once.
        scores: what to begin around, such as `gp.score(pipe, gp.EcoDiff(...), prompts=...)` or a plan: units of like
            score go together, and all codes start at its plan for this budget. None: as published, from the dense
            model.
        encoder: sentence encoder of the router: an object with `encode`, a sentence-transformers folder or hub id;
            None: the pipeline's own pooled text embedding. Published: `sentence-transformers/all-mpnet-base-v2`.
        operating_point: where costs are counted, whole or some fields. Default: the family's; state the resolution
            that the model will be used at.
        pipeline_options: keyword arguments of the pipeline's call, such as height and width.
        output_dir: gets `checkpoint-*`, `curve.json`, `teacher_data` and `router`.
        resume: go on from the newest checkpoint there, to the bit as without the interruption.
        checkpointing_steps: optimiser steps between checkpoints.
        accelerator, log_with: of accelerate; see `gp.recover`.

    Returns:
        A `PromptRouter`, or a `TimestepRouter` with `route_by="timestep"`.

    Raises:
        BadCalibrationData: prompts or data do not fit, or there are fewer distinct prompts than experts.
        GenpruneError: a term is not finite, or a setting does not suit this pipeline. PlanMismatch: a pruned
        pipeline, scores of another model, or a checkpoint of another run.
    """
    from genprune.routers.assembly import assembled

    prompts = checked_request(pipe, settings, prompts)
    learned, encoder = _learn(
        pipe,
        settings,
        prompts,
        data,
        scores,
        encoder,
        operating_point,
        dict(pipeline_options or {}),
        _Folder(output_dir, resume, checkpointing_steps),
        accelerator,
        log_with,
        progress,
    )
    router = assembled(pipe, learned, encoder)
    if output_dir is not None and _is_main(accelerator):
        with whole_file(Path(output_dir) / CURVE) as written:
            written.write_text(json.dumps(learned.curve) + "\n")
        router.save_pretrained(Path(output_dir) / "router")
    return router


@dataclass(frozen=True)
class _Folder:
    """Where checkpoints go."""

    path: str | os.PathLike | None
    resume: bool
    every: int

    def newest(self) -> Path | None:
        found = [] if self.path is None else checkpoints(self.path)
        if found and not self.resume:
            raise GenpruneError(
                f"'{self.path}' has checkpoints of an earlier training ({found[-1].name}); expected none. Pass "
                "resume=True to go on from it, or another output_dir."
            )
        return found[-1] if found else None


def _learn(
    pipe: Any,
    settings: APTP,
    prompts: list[str],
    data: Any,
    scores: Any,
    encoder: Any,
    point: Any,
    options: dict[str, Any],
    folder: _Folder,
    accelerator: Any,
    log_with: str | None,
    progress: bool,
) -> tuple[LearnedCodes, Any]:
    """The training itself."""
    from genprune.routers.encoders import encoder_of

    model = denoiser(pipe)
    found = folder.newest()
    costs = site_costs(model, budget_point(model, point))
    space, start = space_and_start(model, settings, scores, costs)
    distinct = list(dict.fromkeys(prompts))
    embeddings = predictor = None
    boundaries: tuple[float, ...] = ()
    if settings.route_by == "prompt":
        encoder = encoder_of(encoder, pipe)
        embeddings = encoder.encode(distinct, batch_size=1)
        scale = settings.predictor_scale or (1.0 if scores is None else 0.3)
        predictor = ArchitecturePredictor(encoder.dim, space.lengths, settings.seed, scale)
        predictor.standardise(embeddings)
        predictor.begin_at(start)
    else:
        boundaries = noise_boundaries(pipe, prompts, settings, options)
    router_model = RouterModel(predictor, first_codes(start, settings))
    with (
        accelerator_of(accelerator, settings, log_with, folder.path, "genprune-router") as accelerator,
        teaching(model, accelerator.device),
        blocks_checkpointed(model, True) if settings.gradient_checkpointing else contextlib.nullcontext(),
    ):
        check_accelerator(accelerator, settings)
        budget = _budget_costs(model, settings, costs, folder, accelerator)
        with accelerator.main_process_first(), on_device((pipe,), accelerator.device):
            main = accelerator.is_main_process
            rows = pipeline_data(
                pipe,
                pipe,
                data_settings(pipe, settings),
                prompts,
                data,
                options,
                cache_folder(folder.path),
                progress and main,
                main,
            )
        notes = training_notes(settings, prompts, rows, encoder if embeddings is not None else None, accelerator)
        taps = [f"{path}.{index}" for path, length in block_lists(model).items() for index in range(length)]
        training = RouterTraining(
            model, taps, rows, embeddings, router_model, space, budget, settings, boundaries, accelerator
        )
        with training:
            curve = _to_the_end(training, found, folder, notes, progress and accelerator.is_main_process)
    router_model.cpu()
    codes = router_model.codes.detach()
    bias = None
    if embeddings is None:
        usage = usage_of(list(range(settings.experts)), settings.experts)  # boundaries share out the sampler's steps
    else:
        with torch.no_grad():
            similarity = assignment.similarities(space, predictor(embeddings), codes)
        counts = Counter(prompts)
        bias = assignment.balancing_bias(similarity, torch.tensor([counts[prompt] for prompt in distinct]))
        chosen = (similarity + bias).argmax(-1).tolist()
        place = dict(zip(distinct, chosen))
        usage = usage_of([place[prompt] for prompt in prompts], settings.experts)
    of = budget_quantity(settings)
    shift = budget_shift(space, codes, usage, budget, settings.keep, of)
    plans = code_plans(
        space,
        codes,
        costs,
        plan_base(model, costs.sites),
        shift,
        {"method": "aptp", **notes},
        {"keep": settings.keep, "of": settings.of},
        shares_of(space, codes, budget, of, shift),
    )
    if settings.of == "latency":
        plans = [with_latency(model, plan) for plan in plans]
    learned = LearnedCodes(space, predictor, codes, shift, usage, plans, boundaries, embeddings, bias, curve, notes)
    return learned, encoder


def _budget_costs(
    model: torch.nn.Module, settings: APTP, costs: SiteCosts, folder: _Folder, accelerator: Any
) -> SiteCosts:
    """The costs that the budget is of: counted, or measured once for all processes and for a run that goes on."""
    if settings.of != "latency":
        return costs
    file = None if folder.path is None else Path(folder.path) / TIMES
    if folder.resume and file is not None and file.is_file():
        times = json.loads(file.read_text())
    else:
        from accelerate.utils import broadcast_object_list

        times = broadcast_object_list([module_times(model, costs) if accelerator.is_main_process else None])[0]
        if file is not None and accelerator.is_main_process:
            file.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(file) as written:
                written.write_text(json.dumps(times))
    return timed_costs(model, costs, times)


def _to_the_end(
    training: RouterTraining, found: Path | None, folder: _Folder, notes: Mapping[str, Any], progress: bool
) -> list[dict[str, Any]]:
    """All steps that are left; the curve."""
    from tqdm.auto import tqdm

    accelerator, steps = training.accelerator, training.settings.steps
    curve: list[dict[str, Any]] = []
    if found is not None:
        training.step_done, curve = load_checkpoint(found, training.model, training.optimizer, notes)
        logger.info("going on from %s", found)

    def save() -> None:
        if folder.path is not None and accelerator.is_main_process:
            save_checkpoint(folder.path, training.model, training.optimizer, training.step_done, curve, notes)

    bar = tqdm(initial=training.step_done, total=steps, desc="router", unit="step", disable=not progress)
    try:
        while training.step_done < steps:
            record = training.step()
            curve.append(record)
            bar.update()
            bar.set_postfix(loss=f"{record['loss']:.3g}", kept=f"{record['kept']:.3f}")
            accelerator.log({"loss": record["loss"], **record["terms"]}, step=training.step_done)
            if training.step_done % folder.every == 0 or training.step_done == steps:
                save()
    except KeyboardInterrupt:
        save()
        raise
    finally:
        bar.close()
    return curve


def _is_main(accelerator: Any) -> bool:
    if accelerator is not None:
        return accelerator.is_main_process
    from genprune.masks.processes import process_rank

    return process_rank()[0] == 0
