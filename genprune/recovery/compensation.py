"""`compensate`: the layers that read removed units take over what they can, in closed form, before the cut."""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from genprune.costs import operating_point as operating_point_of
from genprune.criteria.obs import check_option
from genprune.cut_guards import as_plan, check_cuttable
from genprune.cutting import check_plan
from genprune.denoising.activations import (
    check_consumer,
    consumers,
    input_moments,
    packages,
    shown,
    taps,
    weight_matrix,
)
from genprune.denoising.capture import check_not_settings, image_size
from genprune.denoising.replay import STEP_WEIGHTS, ModelCall, check_step_weights, recorded_calls
from genprune.errors import GenpruneError, PlanMismatch
from genprune.families import OperatingPoint, denoiser, find_sites
from genprune.gates import attach_gates, gated_sites
from genprune.plan import PruningPlan
from genprune.recovery.exchange import Exchange
from genprune.recovery.least_squares import Residual, Update, least_squares, mean_only
from genprune.recovery.teacher_forcing import in_execution_order, residuals
from genprune.sites import Sites, Slice, effective_keep, kept_entries
from genprune.untouched import untouched

METHODS = ("least_squares", "bias")
_SAMPLING = ("samples", "steps", "timesteps", "guidance_scale", "batch_size", "seed")  # how a pipeline draws
SEQUENTIAL_PACKAGE = 8  # layers that are measured together, where no number is given
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compensation:
    """What a compensation did: for each layer, the mean squared error of its output before and after.

    Attributes:
        errors: layer -> (before, after), per position, on the calibration data.
        skipped: layer -> why it was left as it was.
    """

    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"Compensation of {len(self.errors)} layers"]
        width = max((len(path) for path in self.errors), default=0)
        for path, (before, after) in self.errors.items():
            share = f" ({after / before:.1%} left)" if before > 0 else ""
            lines.append(f"  {path:<{width}}  {before:.4g} -> {after:.4g}{share}")
        return "\n".join(lines + [f"  {path}: {reason}" for path, reason in self.skipped.items()])


def compensate(
    target,
    plan: PruningPlan | str | os.PathLike,
    prompts: Sequence[str] | None = None,
    data: Iterable | None = None,
    *,
    method: str = "least_squares",
    sequential: bool = False,
    steps: int = 20,
    timesteps: int | None = None,
    samples: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 4,
    damping: float = 0.01,
    step_weights: tuple[float, float] = STEP_WEIGHTS,
    modules_per_pass: int | None = None,
    operating_point: OperatingPoint | Mapping[str, int] | None = None,
    pipeline_options: Mapping[str, Any] | None = None,
    loss_fn: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool = True,
) -> Compensation:
    """Update, in place, the layers that read what a plan removes, so that `gp.cut(target, plan)` does less damage.

    Call it on the model that the plan is for, between planning and cutting. Layers whose inputs all stay are
    untouched to the bit, and a layer without a bias gets none. Removed branches, blocks, wrappers and modulation
    channels have no layer that reads them: nothing is solved for those.

    Args:
        target: the supported model, or the pipeline, that the plan was made for.
        plan: what stays; a `PruningPlan`, or the path of one.
        prompts: calibration prompts of a text-to-image pipeline.
        data: batches of a bare model: tensors, dictionaries of its arguments, or `(inputs, target)`.
        method: `least_squares` refits the kept columns and the bias; `bias` moves the bias by the mean of what went.
        sequential: measure each package of layers in the model as it is by then, gated and compensated up to there,
            against the dense model's outputs: later layers make up for earlier ones. Two calls of the model for each
            call and package, instead of one. With all layers in one package it is the same as without.
        steps, samples, guidance_scale, seed, batch_size: of the trajectories that the pipeline draws.
        timesteps: of the calls of each run, how many to measure on, spread evenly; None: all.
        damping: share of the mean diagonal of the Gram matrix added to it, >= 0: holds weights where they were.
        step_weights: of the last and the first step, see OBS-Diff.
        modules_per_pass: layers a package; None: as many as fit in 4 GB of Gram matrices, 8 where sequential.
        operating_point: size of the pictures that the pipeline draws; None: its default.
        pipeline_options: more keyword arguments of the pipeline's call, such as `max_sequence_length`.
        loss_fn: `loss_fn(model, batch)` runs a bare model on batches of another sort.
        progress: show progress bars.

    Returns:
        A `Compensation` with the error of each layer before and after. A plan that removes no heads, neurons or
        channels changes nothing and needs no data.

    Raises:
        BadCalibrationData: prompts or data are missing or empty. PlanMismatch: the plan is for another model, or
        gates or an adapter are attached. UnsupportedModel: a layer is quantised. GenpruneError: an option is out of
        range. The model is then as it was, as it is after Ctrl-C.

    Reference:
        Least squares: the multi-column Optimal Brain Surgeon update, as in OBS-Diff (arXiv 2510.06751) and SlimGPT
        (arXiv 2412.18110). Bias: FLAP (An et al., arXiv 2312.11983).
    """
    model, plan = denoiser(target), as_plan(plan)
    check_option("method", method, METHODS)
    check_step_weights(step_weights)
    if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 <= damping < float("inf"):
        raise GenpruneError(f"damping={damping!r}; expected a number of at least 0, such as 0.01.")
    options = dict(pipeline_options or {})
    check_not_settings(options, _SAMPLING, "gp.compensate")
    if operating_point is not None:
        if not isinstance(operating_point, OperatingPoint):
            operating_point = operating_point_of(model, **operating_point)
        options = image_size(target, operating_point) | options
    check_cuttable(model)
    sites = find_sites(model)
    check_plan(model, plan, sites)
    if gated := gated_sites(model):
        raise PlanMismatch(
            f"gates are attached to {len(gated)} sites ('{gated[0]}', ...); expected a model without. "
            "Call handle.remove() first: the plan says what goes."
        )
    keep = effective_keep(sites, plan.keep)
    kept, skipped = _layers(model, sites, keep, method)
    if not kept:
        return Compensation(skipped=skipped)
    with torch.inference_mode(False), torch.no_grad(), untouched(model):
        calls = recorded_calls(
            target,
            prompts,
            data,
            loss_fn=loss_fn,
            samples=samples,
            steps=steps,
            timesteps=timesteps,
            weights=step_weights,
            guidance_scale=guidance_scale,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
            **options,
        )
        solve = _Solve(model, kept, method, damping)
        run = _sequential if sequential else _at_once
        try:
            run(solve, calls, sites, keep, modules_per_pass, progress)
        except BaseException:
            solve.exchange.restore()
            raise
    if solve.short:
        path, (count, positions) = next(iter(solve.short.items()))
        logger.warning(
            "%d of %d layers were refitted on fewer positions than features ('%s': %d on %d), so that the damping "
            "decides the rest; pass more prompts or data",
            *(len(solve.short), len(kept), path, positions, count),
        )
    return Compensation(solve.errors, skipped)


def _layers(
    model: nn.Module, sites: Sites, keep: Mapping[str, Tensor], method: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The layers to update: path -> features that stay, bool; and those that cannot be, with the reason."""
    kept, skipped = {}, {}
    for path, entries in consumers(sites).items():
        layer = model.get_submodule(path)
        parts = [
            (Slice(path, "in", point.offset * taps(layer), point.width * taps(layer)), keep[site.name])
            for site, point in entries
            if site.name in keep
        ]
        if not parts:
            continue
        check_consumer(path, layer)
        mask = kept_entries(torch.ones(layer.weight[0].numel(), dtype=torch.bool), parts)
        if layer.bias is None and (method == "bias" or not mask.any()):
            skipped[path] = "it has no bias to move"
        else:
            kept[path] = mask
    return kept, skipped


class _Solve:
    """From residuals to new weights, layer by layer; holds the old ones until all is done."""

    def __init__(self, model: nn.Module, kept: dict[str, Tensor], method: str, damping: float):
        self.model, self.kept, self.method, self.damping = model, kept, method, damping
        self.exchange = Exchange(model)
        self.errors: dict[str, tuple[float, float]] = {}
        self.short: dict[str, tuple[int, int]] = {}  # layer -> (features, positions): fewer positions than features

    def new_values(self, path: str, residual: Residual, positions: int) -> tuple[Tensor, Tensor | None]:
        """The layer's weight `(out, features)` and bias after its update."""
        layer = self.model.get_submodule(path)
        kept = self.kept[path].to(layer.weight.device)
        if self.method == "least_squares" and positions < len(residual.mean):
            self.short[path] = len(residual.mean), positions
        if not math.isfinite(residual.energy) or not torch.isfinite(residual.second).all():
            raise GenpruneError(
                f"what '{path}' is given is not finite; expected finite activations. Check the model's weights, and "
                "calibrate in float32 or bfloat16 rather than float16."
            )
        update = self._update(residual, layer.bias is not None)
        self.errors[path] = residual.energy, update.error
        weight = weight_matrix(layer)
        weight[:, kept] += update.weight
        return weight, None if layer.bias is None else layer.bias.detach().double() + update.bias

    def _update(self, residual: Residual, with_bias: bool) -> Update:
        if self.method == "bias":
            return mean_only(residual)
        return least_squares(residual, self.damping, with_bias)


def _at_once(solve: _Solve, calls: list[ModelCall], sites, keep, modules_per_pass, progress) -> None:
    """Every layer on the dense model's activations; nothing is written before all are solved."""
    found = {}
    for path, moments in input_moments(solve.model, list(solve.kept), calls, modules_per_pass, progress):
        layer = solve.model.get_submodule(path)
        kept = solve.kept[path].to(layer.weight.device)
        residual = Residual.of_removed(weight_matrix(layer), moments.second, moments.mean, kept)
        weight, bias = solve.new_values(path, residual, moments.positions)
        found[path] = weight.to(layer.weight.dtype), bias
    for path, (weight, bias) in found.items():
        solve.exchange.put(path, weight, bias)


def _sequential(solve: _Solve, calls: list[ModelCall], sites, keep, modules_per_pass, progress) -> None:
    """A package of layers after the other, in the order in which they run."""
    # Sites without a layer to solve are gone from the start, the others once one of their layers is solved.
    readers = {name: {point.module for point in sites[name].gates} & solve.kept.keys() for name in keep}
    order = in_execution_order(solve.model, list(solve.kept), calls[0])
    solved: set[str] = set()
    groups = packages(solve.model, order, modules_per_pass or SEQUENTIAL_PACKAGE)
    for number, group in enumerate(groups, start=1):
        gates = {n: mask.float() for n, mask in keep.items() if not readers[n] or readers[n] & solved}
        measured = residuals(
            solve.model,
            {path: solve.kept[path] for path in group},
            shown(calls, f"compensating {number}/{len(groups)}", progress),
            dense=solve.exchange.dense,
            present=functools.partial(attach_gates, solve.model, gates, sites),
        )
        for path, (residual, positions) in measured.items():
            solve.exchange.put(path, *solve.new_values(path, residual, positions))
        solved.update(group)
