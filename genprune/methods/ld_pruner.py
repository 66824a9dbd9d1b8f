"""LD-Pruner: operators removed or replaced by cheaper ones, judged by the statistics of final latents."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import ClassVar

from genprune.denoising.capture import checked_prompts
from genprune.errors import BadCalibrationData, GenpruneError, NoMatchingSites
from genprune.families import denoiser, denoiser_slot, host_name
from genprune.layers.distances import squared_error
from genprune.layers.latent_stats import LatentStatistics
from genprune.layers.menu import check_menu, offers
from genprune.layers.operator_candidates import operator_candidates
from genprune.layers.output_loss import OutputLoss
from genprune.layers.scores import LayerScores
from genprune.methods.base import ScoringContext, check_range, check_whole
from genprune.methods.layers import LayerMethod

MENU = ("remove", "heads", "neurons", "channels", "low_rank", "separable", "pooled", "linear")


@dataclass(frozen=True)
class LDPruner(LayerMethod):
    """Every operator removed or replaced alone, and one choice for each under the budget; needs prompts.

    Args:
        criterion: `latent_stats` (published: mean and spread of final latents over whole trajectories) or
            `output_mse` (single calls: much cheaper, and the only one for a bare model).
        menu: what may happen: `remove` (branches, blocks, wrappers), `heads`, `neurons`, `channels` (fewer of them,
            by magnitude), `low_rank` (factored linear layers), `separable` (depthwise and pointwise convolutions),
            `pooled` (resampling by pooling), `linear` (a branch, ResNet block or block fitted by one linear map in
            closed form), and `affine`, `identity`, `relu` (norms and activations; they save time, no MACs).
        shares: what narrower and factored layers keep, each in (0, 1).
        trajectory_steps: denoising steps of the trajectories that latents are compared over, >= 1.
        trajectories: their number for `latent_stats`, >= 2; below 32 the spread means little. None: `samples`.
        prescreen: with `latent_stats`, how many candidates a trajectory is drawn for, the cheapest by `output_mse`
            first; the rest is out. None: all, as published.
        additivity_sets: random sets of removals that additivity is measured on; 0 leaves it out.

    Reference:
        LD-Pruner (arXiv 2404.11936) for the score; the menu of replacements and the choice among them by an exact
        multiple-choice knapsack are this library's.
    """

    criterion: str = "latent_stats"
    menu: tuple[str, ...] = MENU
    shares: tuple[float, ...] = (0.5,)
    trajectory_steps: int = 8
    trajectories: int | None = None
    prescreen: int | None = None
    additivity_sets: int = 0

    name: ClassVar[str] = "ldpruner"
    summary: ClassVar[str] = "operators removed or replaced, by the statistics of final latents; needs prompts"

    def __post_init__(self) -> None:
        for name in ("menu", "shares"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, (str, float)) else tuple(value))
        super().__post_init__()
        if self.criterion not in ("latent_stats", "output_mse"):
            raise GenpruneError(f"criterion={self.criterion!r}; expected 'latent_stats' or 'output_mse'.")
        check_menu(self.menu)
        for share in self.shares:
            check_range("shares", share, 0, 1)
            if share in (0, 1):
                raise GenpruneError(f"shares={self.shares}; expected shares between 0 and 1, such as (0.5,).")
        check_whole("trajectory_steps", self.trajectory_steps, 1)
        for name, least in (("trajectories", 2), ("prescreen", 1)):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), least)
        check_whole("additivity_sets", self.additivity_sets, 0)

    def scored(self, context: ScoringContext) -> LayerScores:
        target, model, sites = context.target, denoiser(context.target), context.costs.sites
        if self.criterion == "latent_stats" and denoiser_slot(target) is None:
            raise BadCalibrationData(
                f"{type(target).__name__} is a bare model, which draws no trajectory; expected a pipeline for "
                "criterion='latent_stats'. Pass the pipeline, or criterion='output_mse' with data=[...]."
            )
        calls = self.calls(context)
        candidates = self.removals(context) if "remove" in self.menu else []
        replacing = tuple(entry for entry in self.menu if entry != "remove")
        if replacing:
            offered = offers(model, sites, calls[0], replacing, self.shares)
            point = context.dense.operating_point
            found = operator_candidates(model, sites, context.costs, offered, calls, point, context.progress)
            candidates += self.eligible(found, sites, host_name(model)) if found else []
        if not candidates:
            raise NoMatchingSites(
                f"nothing of menu={self.menu} fits a layer of this {type(model).__name__} and saves something; "
                f"expected some entry that does. Pass others, such as menu={MENU}."
            )
        candidates, dense_latency, notes = self.timed(context, candidates)
        single = OutputLoss(model, sites, calls, squared_error, context.progress)
        if self.criterion == "output_mse":
            loss, losses = single, single.alone(candidates)
        else:
            candidates = self._screened(candidates, single)
            loss = self._statistics(context)
            losses = loss.alone(candidates, progress=context.progress)
        removals = [candidate for candidate in candidates if candidate.removes]
        report = self.additivity_of(context, loss, removals, losses, self.additivity_sets)
        notes |= {"calls": len(calls)}
        return self.layer_scores(context, candidates, losses, dense_latency, notes, additivity=report)

    def _screened(self, candidates, single: OutputLoss):
        """The candidates that trajectories are drawn for, the least missed by single calls for what they save."""
        if self.prescreen is None or self.prescreen >= len(candidates):
            return candidates
        losses = single.alone(candidates, what="screening")
        quantity = self.of
        ranked = sorted(candidates, key=lambda c: losses[c.name] / max(c.saves[quantity], 1e-9))
        kept = {candidate.name for candidate in ranked[: self.prescreen]}
        return [candidate for candidate in candidates if candidate.name in kept]

    def _statistics(self, context: ScoringContext) -> LatentStatistics:
        options = {"num_inference_steps": self.trajectory_steps, "guidance_scale": self.guidance_scale}
        options = {name: value for name, value in (options | dict(context.options)).items() if value is not None}
        samples = self.trajectories or self.samples or len(context.prompts or ()) or 32
        prompts = checked_prompts(context.target, context.prompts)
        accepted = inspect.signature(type(context.target).__call__).parameters
        return LatentStatistics(
            context.target,
            context.costs.sites,
            prompts,
            samples=samples,
            seed=self.seed,
            batch_size=self.batch_size,
            options={name: value for name, value in options.items() if name in accepted},
        )
