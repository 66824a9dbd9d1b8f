"""The verbs that run a method on a model: `score` and `make_plan`."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from genprune.costs import dense_costs, site_costs
from genprune.costs import operating_point as operating_point_of
from genprune.cutting import cut, was_cut
from genprune.denoising.capture import image_size
from genprune.errors import BudgetUnreachable, GenpruneError
from genprune.families import OperatingPoint, denoiser, family_of, find_sites
from genprune.layers.scores import LayerScores
from genprune.methods import Method
from genprune.methods.base import ScoringContext, check_whole
from genprune.plan import PruningPlan
from genprune.scores import Scores
from genprune.untouched import untouched


def score(
    target,
    method: Method,
    *,
    prompts: Sequence | None = None,
    data: Any = None,
    loss_fn: Callable[..., torch.Tensor] | None = None,
    operating_point: OperatingPoint | Mapping[str, int] | None = None,
    pipeline_options: Mapping[str, Any] | None = None,
    output_dir: str | os.PathLike | None = None,
    resume: bool = False,
    checkpointing_steps: int = 25,
    seed: int | None = None,
    progress: bool = True,
) -> Scores | LayerScores:
    """The importance of every unit of a model; one run serves plans for every budget. The target is not changed.

    Args:
        target: a diffusers pipeline, or a supported model.
        method: which method, and the default budget and constraints of `Scores.plan`.
        prompts: calibration prompts of a text-to-image pipeline; class labels of a class-conditional one.
        data: what else to calibrate on; see `Taylor`.
        loss_fn: `loss_fn(model, batch) -> scalar`, for a bare model with a loss of its own.
        operating_point: where MACs are counted, whole or some fields, and the size of the pictures that a pipeline
            draws to calibrate on. Default: the family's, and the pipeline's default size.
        pipeline_options: keyword arguments of the pipeline's call while it calibrates, such as `max_sequence_length`.
        output_dir: where a method that trains keeps its checkpoints, logits and curve.
        resume: go on from the newest checkpoint in `output_dir`.
        checkpointing_steps: optimiser steps between two checkpoints, >= 1.
        seed: replaces `method.seed`.
        progress: show a progress bar.

    Returns:
        `Scores` of all kinds of sites that the method has a rule for, or of `method.kinds` where it names some;
        `LayerScores` of a method that judges whole layers and operators. Either has `plan(keep=, of=, ...)`.

    Raises:
        UnsupportedModel: no family knows the model. BadCalibrationData: prompts or data are missing, empty or of the
        wrong shape. NoMatchingSites: the model has no site of a kind. GenpruneError: a score is not finite.
    """
    if not isinstance(method, Method):
        raise GenpruneError(
            f"method is {method!r}; expected one such as gp.Magnitude(keep=0.8). See genprune.methods.methods()."
        )
    if (output_dir is not None or resume) and not method.trains:
        raise GenpruneError(
            f"output_dir and resume are for methods that train, and {type(method).__name__} does not; expected a "
            "method such as gp.EcoDiff. Leave them out."
        )
    if resume and output_dir is None:
        raise GenpruneError("resume=True without output_dir; expected the folder with the checkpoints. Pass it.")
    check_whole("checkpointing_steps", checkpointing_steps, 1)
    if seed is not None:
        method = method.changed(seed=seed)
    model = denoiser(target)
    sites = find_sites(model)
    kinds = method.kinds or tuple(kind for kind in sites.kinds() if kind in method.scored_kinds)
    chosen = sites.of_kind(*kinds)
    if method.protect:
        sites.match(*method.protect)  # a pattern that matches nothing is refused before any work
    point = _point(model, operating_point)
    costs = site_costs(model, point, sites)
    # Budgets count against the dense model, also where an earlier cut made this one smaller.
    dense = dense_costs(model, **dataclasses.asdict(point)) if was_cut(model) else costs.total
    size = image_size(target, point) if operating_point else {}
    context = ScoringContext(
        target=target,
        sites=chosen,
        costs=costs,
        dense=dense,
        prompts=prompts,
        data=data,
        loss_fn=loss_fn,
        options=size | dict(pipeline_options or {}),
        output_dir=output_dir,
        resume=resume,
        checkpointing_steps=checkpointing_steps,
        progress=progress,
    )
    with untouched(model):
        scored = method.scored(context)
    made_by = {"method": method.name, "settings": method.to_json(), "seed": method.seed, **scored.made_by}
    if prompts is not None:
        text = json.dumps(list(prompts))
        made_by |= {"prompts": len(prompts), "prompts_sha256": hashlib.sha256(text.encode()).hexdigest()}
    return dataclasses.replace(scored, made_by=made_by)


def make_plan(target, method: Method, *, measure_latency: bool = False, **scoring: Any) -> PruningPlan:
    """Decide what stays under the method's budget. The target is not changed; `gp.cut(target, plan)` does that.

    Args:
        measure_latency: also cut a copy, and time it in turns with the dense model on the device that the model is
            on. Needs memory for a second model.
        scoring: prompts, data, operating_point, ...: all keyword arguments of `score`.

    Returns:
        A `PruningPlan` with params and MACs of dense and pruned, and with latency where it was measured.

    Raises:
        BudgetUnreachable: with a table of what is reachable. Others: as in `score`.
    """
    scored = score(target, method, **scoring)
    if isinstance(scored, LayerScores) and "latency" in scored.method.budgets():
        return _within_latency(denoiser(target), scored)
    plan = scored.plan()
    return with_latency(denoiser(target), plan) if measure_latency else plan


_LATENCY_ROUNDS, _LATENCY_TOLERANCE = 4, 0.02


def _within_latency(model: nn.Module, scored: LayerScores) -> PruningPlan:
    """The plan whose measured latency comes nearest to the budget: planned, timed, and planned again by what it saved.

    What single layers take does not add up to what the model saves, so that their times are scaled in between.
    """
    keep = scored.method.budgets()["latency"]
    best, factor = None, 1.0
    for _ in range(_LATENCY_ROUNDS):
        try:
            plan = scored.scaled_latency(factor).plan()
        except BudgetUnreachable:
            if best is None:
                raise
            break
        plan = with_latency(model, plan)
        share = plan.figures["latency_ms"] / plan.figures["dense_latency_ms"]
        if best is None or abs(share - keep) < abs(best[0] - keep):
            best = share, plan
        if abs(share - keep) <= _LATENCY_TOLERANCE or (share < keep and scored.method.of != "latency"):
            break
        factor *= max(1 - share, 0.01) / max(1 - keep, 0.01)
    share, plan = best
    noted = dict(plan.made_by)
    if scored.method.of == "latency":
        noted["budget"] = {**noted["budget"], "reached": share}
    else:
        noted["budgets"] = {**noted["budgets"], "latency": {"keep": keep, "reached": share}}
    return dataclasses.replace(plan, made_by=noted)


def with_latency(target, plan: PruningPlan, rounds: int = 10) -> PruningPlan:
    """The plan with measured latency: a cut copy and the model itself, one call each in turns.

    Args:
        target: the model, or the pipeline, that the plan is for; on the device to time.
        plan: its operating point is the input.
        rounds: timed calls of each.

    Returns:
        The plan with `dense_latency_ms` and `latency_ms` (medians) in `figures`, and the device in `made_by`.
    """
    from genprune.metrics.latency import compare_latency

    model = denoiser(target)
    point = OperatingPoint(**plan.operating_point)
    parameter = next(model.parameters())
    inputs = family_of(model).example_inputs(model, point, parameter.device, parameter.dtype)
    with untouched(model), torch.inference_mode():
        small = cut(copy.deepcopy(model), plan)
        calls = {"dense": lambda: model(**inputs), "pruned": lambda: small(**inputs)}
        timed = compare_latency(calls, "dense", device=parameter.device, rounds=rounds)
    latency = {"dense_latency_ms": timed.median_ms["dense"], "latency_ms": timed.median_ms["pruned"]}
    return dataclasses.replace(
        plan,
        figures={**plan.figures, **latency},
        made_by={**plan.made_by, "latency_device": timed.device, "latency_threads": timed.threads},
    )


def _point(model: nn.Module, given: OperatingPoint | Mapping[str, int] | None) -> OperatingPoint:
    if isinstance(given, OperatingPoint):
        given = dataclasses.asdict(given)
    return operating_point_of(model, **(given or {}))
