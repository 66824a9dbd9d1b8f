"""What a router training starts from: checked prompts, the space and its first codes, boundaries, notes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genprune.costs import SiteCosts
from genprune.costs import operating_point as operating_point_of
from genprune.criteria import criterion_named
from genprune.cutting import plan_base, was_cut
from genprune.denoising.capture import capture_runs, checked_prompts
from genprune.denoising.targets import FlowProcess, forward_process
from genprune.errors import BadCalibrationData, GenpruneError, PlanMismatch
from genprune.families import OperatingPoint, denoiser, denoiser_slot
from genprune.plan import PruningPlan
from genprune.recovery import NormalizedDistillation
from genprune.routers.architecture import ArchitectureSpace
from genprune.routers.settings import APTP
from genprune.scores import Scores


def checked_request(pipe: Any, settings: APTP, prompts: Sequence[str]) -> list[str]:
    """The prompts, after every check that needs no work."""
    if not isinstance(settings, APTP):
        raise GenpruneError(f"settings is {settings!r}; expected how to train. Pass gp.APTP(experts=8), say.")
    if denoiser_slot(pipe) is None:
        raise BadCalibrationData(
            f"{type(pipe).__name__} is a bare model; a router is trained with prompts and the pipeline that reads "
            "them. Pass the pipeline."
        )
    if was_cut(denoiser(pipe)):
        raise PlanMismatch(
            "this pipeline is pruned already; expected a dense one, whose units the codes choose among. Load the base "
            "that it was pruned from."
        )
    prompts = checked_prompts(pipe, prompts)
    if settings.route_by == "prompt" and not (prompts and isinstance(prompts[0], str)):
        raise BadCalibrationData(
            f"{type(pipe).__name__} is not called with text; expected a text-to-image pipeline to route by prompts. "
            "Pass APTP(route_by='timestep')."
        )
    if settings.route_by == "prompt" and (count := len(set(prompts))) < settings.experts:
        raise BadCalibrationData(
            f"{count} different prompts for {settings.experts} experts; expected more prompts than experts, by far. "
            f"Pass more prompts, or experts={max(1, count // 10)}."
        )
    return prompts


def space_and_start(
    model: nn.Module, settings: APTP, scores: Any, costs: SiteCosts
) -> tuple[ArchitectureSpace, Tensor]:
    """The space, and the logits that all codes begin around."""
    ranked, kept = None, None
    if isinstance(scores, Scores):
        _check_scores(scores.base, model, costs)
        ranked, kept = scores.values, scores.plan(settings.keep, budget_quantity(settings)).keep
    elif isinstance(scores, PruningPlan):
        _check_scores(scores.base, model, costs)
        ranked = kept = scores.keep
    elif scores is not None:
        raise GenpruneError(
            f"scores is a {type(scores).__name__}; expected what gp.score returns, or a PruningPlan. Leave it out to "
            "begin at the dense model."
        )
    elif settings.grouping == "magnitude":
        ranked = criterion_named("magnitude")().scores(model, costs.sites, None)
    space = ArchitectureSpace.of(
        model, settings.kinds, settings.depth, settings.groups, ranked, settings.temperature, settings.offset
    )
    return space, space.start(kept, settings.start_scale)


def _check_scores(base: Any, model: nn.Module, costs: SiteCosts) -> None:
    if base != plan_base(model, costs.sites):
        raise PlanMismatch(
            f"the scores are of another {base.host}; expected those of this {type(model).__name__}. Score it with "
            "gp.score(pipe, ...)."
        )


def first_codes(start: Tensor, settings: APTP) -> Tensor:
    """Codes before the first step: around the start, told apart by small noise where no warm-up does that."""
    generator = torch.Generator().manual_seed(settings.seed)
    noise = torch.randn((settings.experts, len(start)), generator=generator)
    return start + 0.1 * noise * (settings.experts > 1)


def noise_boundaries(pipe: Any, prompts: list, settings: APTP, options: dict[str, Any]) -> tuple[float, ...]:
    """Noise levels between the experts, so that each has as many of the sampler's steps as the others."""
    given = {name: value for name, value in options.items() if name != "num_inference_steps"}
    steps = max(settings.experts, int(options.get("num_inference_steps", settings.teacher_steps)))
    run = next(capture_runs(pipe, prompts[:1], samples=1, steps=steps, keep=lambda index: False, **given))
    levels = (run.timesteps.double() / forward_process(pipe.scheduler).train_timesteps).tolist()
    levels = sorted(set(levels))  # solvers of second order call at a level twice
    if len(levels) < settings.experts:
        raise GenpruneError(
            f"the sampler has {len(levels)} noise levels for {settings.experts} experts; expected at least one for "
            "each. Pass fewer experts, or more num_inference_steps in pipeline_options."
        )
    places = [round(len(levels) * part / settings.experts) for part in range(1, settings.experts)]
    return tuple((levels[place - 1] + levels[place]) / 2 for place in places)


def data_settings(pipe: Any, settings: APTP) -> NormalizedDistillation:
    """The settings that rows are drawn by."""
    flow = isinstance(forward_process(pipe.scheduler), FlowProcess)
    return NormalizedDistillation(
        steps=settings.steps,
        batch_size=settings.batch_size,
        min_snr_gamma=settings.min_snr_gamma if flow or settings.min_snr_gamma is not None else 5.0,
        timestep_sampling="logit_normal" if flow else "uniform",
        prompt_dropout=settings.prompt_dropout,
        samples=settings.samples,
        teacher_steps=settings.teacher_steps,
        teacher_guidance=settings.teacher_guidance,
        seed=settings.seed,
    )


def training_notes(settings: APTP, prompts: list, rows: Any, encoder: Any, accelerator: Any) -> dict[str, Any]:
    """What a checkpoint has to agree with, and what plans say of their making."""
    return {
        "settings": {name: value for name, value in settings.to_json().items() if name != "batch_size"},
        "rows_per_step": settings.batch_size * accelerator.num_processes,
        "prompts": len(prompts),
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "data": rows.fingerprint,
        "encoder": None if encoder is None else encoder.to_json(),
    }


def budget_quantity(settings: APTP) -> str:
    """What costs hold the budget: times stand where MACs do."""
    return "macs" if settings.of == "latency" else settings.of


def budget_point(model: nn.Module, given: OperatingPoint | Mapping[str, int] | None) -> OperatingPoint:
    if isinstance(given, OperatingPoint):
        return given
    return operating_point_of(model, **(given or {}))
