"""TinyFusion: learned depth. Which layers of each group of neighbours stay, trained together with low-rank updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from genprune.allocation import Request
from genprune.allocation.fit import TOLERANCE
from genprune.allocation.request import eligible
from genprune.costs import Costs, SiteCosts
from genprune.cutting import plan_base
from genprune.denoising.capture import check_not_settings
from genprune.errors import BudgetUnreachable, GenpruneError, NoMatchingSites
from genprune.families import denoiser
from genprune.masks.depth_gates import decided, probabilities
from genprune.masks.depth_groups import DepthGroup, fixed_groups, groups_for, sequences
from genprune.masks.depth_scores import DepthScores
from genprune.masks.depth_settings import DepthTraining
from genprune.methods.base import Method, ScoringContext, check_whole
from genprune.sites import Sites

LAYERS = ("branch", "block", "wrapper")


@dataclass(frozen=True)
class TinyFusion(DepthTraining, Method):
    """Exactly n of every m neighbouring layers stay; which, is learned by gradient, with LoRA beside.

    Needs prompts (a pipeline) or data (a model). Layers are blocks, or what `kinds` names. The groups are given, or
    follow from the budget:

    - `TinyFusion(groups=(1, 2))`: one of two stays everywhere; a shorter last group keeps the same share, rounded up.
      With `keep` as well, it is an error where the groups do not meet it.
    - `TinyFusion(keep=0.5, of="macs")`: groups of `group_size`, with as many kept in each as meets the budget best.
    - neither: `groups=(1, 2)`.

    `gp.score` gives `DepthScores`: `values` are the probabilities of being kept, and `plan()` is the decision: in
    each group the choice with the highest mean logit. With another `keep` or `groups` the layers of the highest
    probabilities stay, in groups that were not trained for; train again where it matters.

    Args:
        All of `genprune.masks.depth_settings.DepthTraining` (how it is learned) and of `Method` (the budget).
        keep: share of the dense model that stays, or None: what the groups say.
        groups: (kept, layers) of each group, or None: as the budget needs.
        group_size: layers of a group at most, where `groups` is None, >= 1.

    Reference:
        TinyFusion, "Diffusion Transformers Learned Shallow" (arXiv 2412.01199); written from the paper.
    """

    keep: float | None = None
    groups: tuple[int, int] | None = None
    group_size: int = 4

    name: ClassVar[str] = "tiny_fusion"
    needs: ClassVar[tuple[str, ...]] = ("weights", "gradients", "training")
    additive: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    scored_kinds: ClassVar[tuple[str, ...]] = LAYERS
    summary: ClassVar[str] = "learned depth: n of every m layers, with LoRA beside; needs prompts or data"

    def __post_init__(self) -> None:
        for field in ("groups", "temperatures"):
            if isinstance(getattr(self, field), list):
                object.__setattr__(self, field, tuple(getattr(self, field)))
        keep = self.keep
        if keep is None:  # the groups say what stays; every other method has a number to check
            object.__setattr__(self, "keep", 1.0)
        super().__post_init__()
        object.__setattr__(self, "keep", keep)
        self.check()
        check_whole("group_size", self.group_size, 1)
        if self.groups is not None:
            whole = isinstance(self.groups, tuple) and all(type(number) is int for number in self.groups)
            if not whole or len(self.groups) != 2 or not 0 <= self.groups[0] <= self.groups[1] or self.groups[1] < 1:
                raise GenpruneError(
                    f"groups={self.groups!r}; expected (kept, layers) with 0 <= kept <= layers. Pass e.g. "
                    "groups=(1, 2) to keep one of every two layers."
                )

    @classmethod
    def facts(cls) -> type[TinyFusion]:
        return cls

    def scored(self, context: ScoringContext) -> DepthScores:
        from genprune.masks.depth_batches import BatchPool
        from genprune.masks.depth_training import DepthProblem, train_depth

        check_not_settings(context.options, [field.name for field in dataclasses.fields(self)], "gp.TinyFusion")
        sites = context.costs.sites
        kinds = self.kinds or _coarsest(sites)
        groups = self.depth_groups(context.costs, context.dense, kinds)
        learned = [group for group in groups if group.choices > 1]
        logits: dict[DepthGroup, Tensor] = {group: torch.zeros(1) for group in groups}
        curve: list[dict[str, float]] = []
        if learned:
            batches = BatchPool(
                context.target,
                self,
                self.seed,
                prompts=context.prompts,
                data=context.data,
                loss_fn=context.loss_fn,
                options=context.options,
            )
            trained, curve = train_depth(
                DepthProblem(denoiser(context.target), sites, learned, batches),
                self,
                self.seed,
                output_dir=context.output_dir,
                resume=context.resume,
                checkpointing_steps=context.checkpointing_steps,
                progress=context.progress,
            )
            logits |= dict(zip(learned, trained))
        values = {name: torch.ones(1) for name in sites.of_kind(*kinds)}  # what is protected stays
        for group in groups:
            share = probabilities(group, logits[group], self.logit_scale)
            values |= {name: torch.tensor([each]) for name, each in share.items()}
        decisions = {group.layers: decided(group, logits[group]) for group in groups}
        notes = {
            "depth": [{"layers": list(layers), "kept": list(kept)} for layers, kept in decisions.items()],
            "training": {"steps": len(curve), **({"loss": curve[-1]["loss"]} if curve else {})},
        }
        base = plan_base(denoiser(context.target))
        return DepthScores(values, decisions, self, base, context.costs, context.dense, notes)

    def depth_groups(self, costs: SiteCosts, dense: Costs, kinds: Sequence[str]) -> list[DepthGroup]:
        """The groups, with how many layers each keeps.

        Raises:
            NoMatchingSites: no layer of these kinds may go, or no group has a choice. BudgetUnreachable: no numbers
            meet the budget, or `groups` and `keep` contradict each other. GenpruneError: a layer lies inside another.
        """
        layers = eligible(costs.sites, Request(1.0, self.of, tuple(kinds), protect=self.protect))
        runs = sequences(layers)
        unit = {name: 1 if self.of == "units" else getattr(costs.unit(name), self.of) for name in layers}
        if self.of == "units":
            whole = total = len(costs.sites.of_kind(*kinds))
        else:
            whole, total = getattr(dense, self.of), getattr(costs.total, self.of)
        if self.groups is not None or self.keep is None:
            kept, size = self.groups or (1, 2)
            groups = fixed_groups(runs, kept, size)
            if all(group.kept == len(group.layers) for group in groups) and kept < size:
                raise NoMatchingSites(
                    f"no {size} layers of kinds {', '.join(kinds)} follow each other in {costs.sites.host}, so that "
                    f"groups=({kept}, {size}) remove none. Pass other kinds, or keep=0.75 without groups."
                )
        else:
            groups = groups_for(runs, self.group_size, unit, total, self.keep * whole)
        if self.keep is not None:
            self._check_reached(groups, unit, total, whole, costs.sites.host)
        return groups

    def _check_reached(
        self, groups: Sequence[DepthGroup], unit: dict[str, int], total: int, whole: int, host: str
    ) -> None:
        """Raises `BudgetUnreachable` where the groups miss the budget by more than half a layer and the tolerance."""
        removed = sum(
            (len(group.layers) - group.kept) * sum(unit[name] for name in group.layers) / len(group.layers)
            for group in groups
        )
        reached, least = (total - removed) / whole, (total - sum(unit.values())) / whole
        # groups that follow from the budget come as near as whole layers can; given ones are to be exact
        layer = (max if self.groups is None else min)(unit.values()) / whole
        if abs(reached - self.keep) <= max(TOLERANCE, layer / 2) + 1e-9:
            return
        if self.groups is not None:
            advice = f"Leave keep out, pass keep={reached:.3f}, or groups=None to have them follow from keep"
            found = f"groups={self.groups} keep {reached:.4f} of the {self.of} of {host}; expected keep={self.keep:g}"
        else:
            found = (
                f"keep={self.keep:g} of {self.of} cannot be reached in {host} by removing its {len(unit)} layers; the "
                f"nearest is {reached:.4f}; expected a share from {least:.4f} to {total / whole:.4f}"
            )
            advice = "Pass another keep, loosen protect, or add kinds"
        raise BudgetUnreachable(f"{found}. {advice}.")


def _coarsest(sites: Sites) -> tuple[str, ...]:
    """Blocks where the model has them; otherwise branches and wrappers, as a U-Net without text has them."""
    present = sites.kinds()
    found = ("block",) if "block" in present else tuple(kind for kind in LAYERS if kind in present)
    if not found:
        raise NoMatchingSites(
            f"{sites.host} has no layer that can go as a whole; it has sites of kinds {', '.join(present)}. Use "
            "gp.Taylor or gp.EcoDiff, which narrow layers."
        )
    return found
