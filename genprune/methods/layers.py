"""What methods that remove or replace whole layers share: budgets together, constraints, calls to judge them on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from genprune.allocation.request import check_budget
from genprune.cutting import plan_base
from genprune.denoising.capture import check_not_settings
from genprune.denoising.replay import ModelCall, recorded_calls
from genprune.errors import GenpruneError
from genprune.families import denoiser, family_named, host_name
from genprune.layers.additivity import Additivity, additivity
from genprune.layers.candidates import DEPTH_KINDS, Candidate, removal_candidates
from genprune.layers.constraints import allowed, eligible, limits
from genprune.layers.distances import distance_named
from genprune.layers.greedy import Removal, greedy_order
from genprune.layers.latencies import with_latencies
from genprune.layers.latent_stats import LatentStatistics
from genprune.layers.output_loss import OutputLoss
from genprune.layers.scores import LayerScores
from genprune.methods.base import Method, ScoringContext, check_range, check_whole
from genprune.sites import Sites

AUTO = "auto"


@dataclass(frozen=True)
class LayerMethod(Method):
    """A method that judges layers as a whole. Use a subclass.

    Args:
        of: `params`, `macs`, or `latency` (layers are timed on the model's device, and a plan is timed and corrected).
        kinds: kinds of layers that may go: `branch` (attention, feed-forward, ResNet branch with its shortcut kept),
            `block`, `wrapper`; None: the method's default.
        also: more budgets to keep at once, pairs of a quantity and a share, such as `(("macs", 0.6),)`.
        max_consecutive: at most this many neighbouring blocks of a list go; "auto": 2 in diffusion transformers, where
            output losses prefer runs of late blocks that recover badly, any number elsewhere; None: any number.
        n_of_m: `(n, m)`: of every m consecutive blocks exactly n stay.
        protect_first: blocks at the start of a transformer's first list that stay; "auto": those of its family.
        samples: images that a pipeline draws to judge layers on; None: one per prompt, 16 without prompts.
        steps: denoising steps of those runs, >= 1.
        timesteps: calls of each run to judge on, spread evenly; None: all.
        guidance_scale: of those runs; None: the pipeline's default.
        batch_size: images a run, >= 1.

    Raises:
        GenpruneError: a value out of range.
    """

    keep: float = 0.7
    also: tuple[tuple[str, float], ...] = ()
    max_consecutive: int | str | None = AUTO
    n_of_m: tuple[int, int] | None = None
    protect_first: int | str = AUTO
    samples: int | None = None
    steps: int = 20
    timesteps: int | None = 5
    guidance_scale: float | None = None
    batch_size: int = 8

    quantities: ClassVar[tuple[str, ...]] = ("params", "macs", "latency")
    scored_kinds: ClassVar[tuple[str, ...]] = DEPTH_KINDS
    needs: ClassVar[tuple[str, ...]] = ("weights", "outputs")
    additive: ClassVar[bool] = True
    default_kinds: ClassVar[tuple[str, ...]] = DEPTH_KINDS

    def __post_init__(self) -> None:
        object.__setattr__(self, "also", tuple((str(name), share) for name, share in self.also))
        if self.n_of_m is not None:
            object.__setattr__(self, "n_of_m", tuple(self.n_of_m))
            n, m = self.n_of_m if len(self.n_of_m) == 2 else (0, 0)
            if not all(isinstance(each, int) for each in (n, m)) or not 0 < n < m:
                raise GenpruneError(f"n_of_m={self.n_of_m}; expected two whole numbers 0 < n < m, such as (1, 2).")
        super().__post_init__()
        for quantity, share in self.also:
            check_budget(share, quantity, self.quantities)
            if quantity == self.of:
                raise GenpruneError(f"also={self.also} repeats of='{self.of}'; expected another quantity there.")
        if self.max_consecutive not in (AUTO, None):
            check_whole("max_consecutive", self.max_consecutive, 1)
        if self.protect_first != AUTO:
            check_whole("protect_first", self.protect_first, 0)
        for name in ("samples", "timesteps"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        for name in ("steps", "batch_size"):
            check_whole(name, getattr(self, name), 1)
        if self.guidance_scale is not None:
            check_range("guidance_scale", self.guidance_scale, 0, 1000)

    @classmethod
    def facts(cls) -> type[LayerMethod]:
        return cls

    def budgets(self) -> dict[str, float]:
        """Quantity -> share of the dense model that stays, the main one first."""
        return {self.of: self.keep, **dict(self.also)}

    def neighbours(self, host: str) -> int | None:
        """How many neighbouring blocks may go in a host of this class."""
        return family_named(host).neighbours if self.max_consecutive == AUTO else self.max_consecutive

    def protected(self, host: str, sites: Sites) -> tuple[str, ...]:
        """Names and patterns of what stays: the given ones, and the first blocks of a transformer."""
        first = family_named(host).first_blocks if self.protect_first == AUTO else self.protect_first
        blocks = [name for name, site in sites.items() if site.kind == "block"]
        lists = {name.rpartition(".")[0] for name in blocks[:1]}
        return self.protect + tuple(name for name in blocks if name.rpartition(".")[0] in lists)[:first]

    def offers(self, candidate: Candidate, sites: Sites) -> bool:
        """Whether this method's kinds allow a candidate."""
        return candidate.removes is None or sites[candidate.removes].kind in (self.kinds or self.default_kinds)

    def eligible(self, candidates: Iterable[Candidate], sites: Sites, host: str) -> list[Candidate]:
        """The candidates that may go. Raises `NoMatchingSites`."""
        return eligible(candidates, sites, lambda c: self.offers(c, sites), self.protected(host, sites))

    def calls(self, context: ScoringContext) -> list[ModelCall]:
        """Calls of the model to judge layers on: the same for every layer."""
        settings = [field.name for field in dataclasses.fields(self)]
        check_not_settings(context.options, settings, f"gp.{type(self).__name__}")
        return recorded_calls(
            context.target,
            context.prompts,
            context.data,
            loss_fn=context.loss_fn,
            samples=self.samples,
            steps=self.steps,
            timesteps=self.timesteps,
            weights=(1.0, 1.0),
            guidance_scale=self.guidance_scale,
            batch_size=self.batch_size,
            seed=self.seed,
            progress=context.progress,
            **context.options,
        )

    def removals(self, context: ScoringContext) -> list[Candidate]:
        """The removal of every layer that may go."""
        sites, model = context.costs.sites, denoiser(context.target)
        kinds = tuple(kind for kind in self.kinds or self.default_kinds if kind in sites.kinds())
        found = removal_candidates(sites, context.costs, kinds or DEPTH_KINDS)
        return self.eligible(found, sites, host_name(model))

    def timed(
        self, context: ScoringContext, candidates: Sequence[Candidate]
    ) -> tuple[list[Candidate], float | None, dict[str, Any]]:
        """The candidates with measured milliseconds where a budget asks for them; the dense model's; and notes."""
        if "latency" not in self.budgets():
            return list(candidates), None, {}
        timed, dense, device = with_latencies(
            denoiser(context.target), context.costs.sites, candidates, context.dense.operating_point
        )
        return timed, dense, {"latency_device": device}

    def enough(self, context: ScoringContext, dense_latency: float | None) -> Callable[[Sequence[Candidate]], bool]:
        """Whether layers that went save what all budgets ask for."""

        def reached(taken: Sequence[Candidate]) -> bool:
            for quantity, keep in self.budgets().items():
                if quantity == "latency":
                    dense = now = dense_latency
                else:
                    dense, now = getattr(context.dense, quantity), getattr(context.costs.total, quantity)
                if now - sum(candidate.saves[quantity] for candidate in taken) > keep * dense:
                    return False
            return True

        return reached

    def walk(
        self, context: ScoringContext, loss: OutputLoss, candidates: Sequence[Candidate], dense_latency: float | None
    ) -> tuple[Removal, ...]:
        """Greedy removals down to the budget, each scored with the ones before it gone."""
        model = denoiser(context.target)
        host = host_name(model)
        rules = limits(candidates, context.costs.sites, self.neighbours(host))
        names = [candidate.name for candidate in candidates]
        order = greedy_order(
            loss, candidates, self.enough(context, dense_latency), lambda taken: allowed(taken, rules, names)
        )
        return tuple(order)

    def additivity_of(
        self,
        context: ScoringContext,
        loss: OutputLoss | LatentStatistics,
        candidates: Sequence[Candidate],
        losses: Mapping[str, float],
        sets: int,
    ) -> Additivity | None:
        """Whether these losses add up, on sets that save up to the budget; None for no sets or too few layers."""
        if not sets or len(candidates) < 3:
            return None
        quantity = self.of if self.of != "latency" else "macs"
        most = (1 - self.keep) * getattr(context.dense, quantity)
        return additivity(
            loss,
            candidates,
            losses,
            sets=sets,
            saving=(quantity, 0.0, most),
            seed=self.seed,
            progress=context.progress,
        )

    def layer_scores(
        self,
        context: ScoringContext,
        candidates: Sequence[Candidate],
        losses: Mapping[str, float],
        dense_latency: float | None,
        notes: Mapping[str, Any],
        **found: Any,
    ) -> LayerScores:
        """What `scored` returns; `found` is an additivity report or a greedy order, where there is one."""
        return LayerScores(
            losses=losses,
            candidates={candidate.name: candidate for candidate in candidates},
            method=self,
            base=plan_base(denoiser(context.target)),
            costs=context.costs,
            dense=context.dense,
            made_by=notes,
            dense_latency=dense_latency,
            **found,
        )


@dataclass(frozen=True)
class LaptopDiff(LayerMethod):
    """Layers whose absence changes the output least, as an exact 0/1 selection; needs prompts, or data for a model.

    Every layer is removed alone, and the squared error of the denoiser's output is its loss; the set of layers that
    saves enough with the least sum of losses goes. Whether such sums mean anything is measured on random sets (see
    `LayerScores.additivity`); where they do not, layers are removed one after the other and scored again in between.

    Args:
        distance: `output_mse` (published), `l2`, `angular`, or `js` for classifiers.
        selection: `knapsack`, `greedy` (score again after each removal), or `auto`: greedy where additivity fails
            (with `n_of_m` never: a greedy walk cannot hold to it).
        additivity_sets: random sets that it is measured on, >= 2; 0 leaves it out.
        min_correlation: additivity fails below this rank correlation, in [-1, 1].

    Reference:
        LAPTOP-Diff (arXiv 2404.11098).
    """

    distance: str = "output_mse"
    selection: str = AUTO
    additivity_sets: int = 16
    min_correlation: float = 0.7

    name: ClassVar[str] = "laptop"
    summary: ClassVar[str] = "whole layers by output loss, as an exact knapsack; needs prompts or data"

    def __post_init__(self) -> None:
        super().__post_init__()
        distance_named(self.distance)
        if self.selection not in (AUTO, "knapsack", "greedy"):
            raise GenpruneError(f"selection={self.selection!r}; expected 'auto', 'knapsack' or 'greedy'.")
        check_whole("additivity_sets", self.additivity_sets, 0)
        if self.additivity_sets == 1:
            raise GenpruneError("additivity_sets=1; expected 0, or 2 and more: one set has no correlation.")
        if self.n_of_m is not None and self.selection == "greedy":
            raise GenpruneError(
                f"n_of_m={self.n_of_m} fixes how many blocks of a group go, which a greedy walk cannot hold to; "
                "expected None. Pass selection='knapsack', or max_consecutive."
            )
        check_range("min_correlation", self.min_correlation, -1, 1)

    def scored(self, context: ScoringContext) -> LayerScores:
        model = denoiser(context.target)
        candidates, dense_latency, notes = self.timed(context, self.removals(context))
        calls = self.calls(context)
        loss = OutputLoss(model, context.costs.sites, calls, distance_named(self.distance), context.progress)
        losses = loss.alone(candidates)
        report = self.additivity_of(context, loss, candidates, losses, self.additivity_sets)
        fails = report is not None and not report.spearman >= self.min_correlation
        greedy = self.selection == "greedy" or (self.selection == AUTO and fails and self.n_of_m is None)
        order = self.walk(context, loss, candidates, dense_latency) if greedy else None
        notes |= {"calls": len(calls), "fell_back_to_greedy": bool(greedy and self.selection == AUTO)}
        return self.layer_scores(context, candidates, losses, dense_latency, notes, additivity=report, order=order)


@dataclass(frozen=True)
class FinerCut(LayerMethod):
    """Attention and feed-forward layers one at a time, scored again after each; needs prompts, or data for a model.

    Args:
        distance: `angular` (default), `l2`, `output_mse`, or `js` for classifiers.

    Reference:
        FinerCut (arXiv 2405.18218). Blocks without separate branches (FLUX's single blocks) go as a whole.
    """

    distance: str = "angular"

    name: ClassVar[str] = "finercut"
    default_kinds: ClassVar[tuple[str, ...]] = ("branch", "block")
    summary: ClassVar[str] = "attention and feed-forward layers, greedily with re-scoring; needs prompts or data"

    def __post_init__(self) -> None:
        super().__post_init__()
        distance_named(self.distance)
        if self.n_of_m is not None:
            raise GenpruneError(
                f"n_of_m={self.n_of_m} fixes how many blocks of a group go, which a greedy walk cannot hold to; "
                "expected None. Use gp.LaptopDiff, or max_consecutive."
            )

    def offers(self, candidate: Candidate, sites: Sites) -> bool:
        """With the default kinds, a block only where it has no branches of its own."""
        site = sites[candidate.removes]
        if self.kinds is None and site.kind == "block":
            return not any(other.parent == site.name and other.kind == "branch" for other in sites.values())
        return super().offers(candidate, sites)

    def scored(self, context: ScoringContext) -> LayerScores:
        model = denoiser(context.target)
        candidates, dense_latency, notes = self.timed(context, self.removals(context))
        calls = self.calls(context)
        loss = OutputLoss(model, context.costs.sites, calls, distance_named(self.distance), context.progress)
        order = self.walk(context, loss, candidates, dense_latency)
        losses = {removal.name: removal.loss for removal in order}
        return self.layer_scores(
            context, candidates, losses, dense_latency, notes | {"calls": len(calls)}, order=order
        )
