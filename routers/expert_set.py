"""`ExpertSet`: what every router has, whatever it routes by: experts of one base model, and a balance among them."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import nn

from genprune.cutting import plan_base
from genprune.errors import GenpruneError, PlanMismatch
from genprune.plan import PlanBase, PruningPlan
from genprune.routers.balance import mean_share
from genprune.routers.experts import Expert
from genprune.routers.fingerprints import same_weights, weights_fingerprint

logger = logging.getLogger(__name__)
_RARELY = 10  # an expert is rarely used below 1 / (10 K) of the training prompts


class ExpertSet:
    """K experts of one base model.

    Args:
        experts: at least one; all of their plans are for `base`.
        base: the model, as the plans name it.
        training: notes of the training, JSON data. Its `settings` (or itself) say in `keep` (or `target`) the trained
            average budget, and in `of` what it is of.
        weights_fingerprint: of the base model's weights; None: unknown, then they are not compared.
        made_by: what made the router, JSON data.

    Raises:
        PlanMismatch: a plan is for another model.
        GenpruneError: no experts, or their usage sums to more than 1.
    """

    kind = "experts"

    def __init__(
        self,
        experts: Sequence[Expert],
        *,
        base: PlanBase,
        training: Mapping[str, Any] | None = None,
        weights_fingerprint: str | None = None,
        made_by: Mapping[str, Any] | None = None,
    ) -> None:
        self.experts = _checked(experts, base)
        self.base, self.weights_fingerprint = base, weights_fingerprint
        self.training, self.made_by = dict(training or {}), dict(made_by or {})
        for said in self.collapse():
            logger.warning("%s", said)

    @property
    def plans(self) -> tuple[PruningPlan, ...]:
        """The plan of each expert."""
        return tuple(expert.plan for expert in self.experts)

    @property
    def usage(self) -> tuple[float, ...]:
        """Share of what was trained on that goes to each expert."""
        return tuple(expert.usage for expert in self.experts)

    @property
    def shares(self) -> tuple[float, ...]:
        """MACs that each expert keeps, of the dense model's. Raises `PlanMismatch` where a plan does not say."""
        return tuple(expert.share for expert in self.experts)

    @property
    def trained_share(self) -> float:
        """Mean MACs under the trained balance; without one, of all experts alike."""
        usage = self.usage if any(self.usage) else [1.0] * len(self.experts)
        return mean_share(usage, self.shares)

    @property
    def target(self) -> float:
        """Mean share of MACs that the router was trained for; `trained_share` where the budget was not of MACs."""
        settings = {**self.training, **self.training.get("settings", {})}
        asked = settings.get("target", settings.get("keep"))
        of_macs = asked is not None and settings.get("of", "macs") == "macs"
        return float(asked) if of_macs else self.trained_share

    @property
    def largest(self) -> int:
        """The expert that keeps the most MACs; of equal ones the first."""
        return self.shares.index(max(self.shares))

    def with_experts(self, experts: Sequence[Expert]) -> Self:
        """A copy with other experts in the places of these, such as fine-tuned ones.

        Raises:
            PlanMismatch: another number, or a plan for another model or that keeps other units than the one it
                replaces.
        """
        experts = _checked(experts, self.base)
        if len(experts) != len(self.experts):
            raise PlanMismatch(
                f"there are {len(experts)} experts for a router of {len(self.experts)}; expected as many, because "
                "routes count them. Pass one for each of router.experts, in their order."
            )
        for index, (new, old) in enumerate(zip(experts, self.experts)):
            if _units(new.plan) != _units(old.plan):
                raise PlanMismatch(
                    f"expert {index} keeps other units than the one that it replaces; expected the same plan, "
                    "which is what prompts are routed by. Use dataclasses.replace(router.experts[index], weights=...)."
                )
        twin = copy.copy(self)
        twin.experts = experts
        return twin

    def check_base(self, model: nn.Module, weights: bool = True) -> None:
        """Refuse a model that these experts are not of.

        Args:
            model: the dense denoiser.
            weights: compare its weights too; False for a fine-tune of the base that is meant.

        Raises:
            PlanMismatch: another host, other sites or layers, or other weights.
        """
        found = plan_base(model)
        if found.host != self.base.host:
            raise PlanMismatch(
                f"the model is a {found.host}, the router's experts are of a {self.base.host}; expected that. Load "
                "the pipeline that the router was trained on."
            )
        if found.sites_sha256 != self.base.sites_sha256:
            raise PlanMismatch(
                f"the {found.host} has other sites or layers ({found.sites_sha256[:12]}) than the one that the router "
                f"was trained on ({self.base.sites_sha256[:12]}); expected that one, dense. Load the pipeline that "
                "the router was trained on; one that was cut before does not serve."
            )
        if not weights or self.weights_fingerprint is None:
            return
        here = weights_fingerprint(model)
        if here is None:
            logger.warning(
                "the weights of the %s are not in memory: whether the router was trained on them cannot be compared",
                found.host,
            )
        elif not same_weights(here, self.weights_fingerprint):
            raise PlanMismatch(
                f"the weights of this {found.host} are not those that the router was trained on (found "
                f"{here.split()[0]}, expected {self.weights_fingerprint.split()[0]}). Load that pipeline; for a "
                "fine-tune of it that is meant, pass weights=False to check_base."
            )

    def collapse(self) -> list[str]:
        """What is said of experts that are one and the same, or that hardly anything goes to; of K = 1 nothing."""
        if len(self.experts) == 1:
            return []
        said, alike = [], {}
        for index, plan in enumerate(self.plans):
            alike.setdefault(_units(plan), []).append(index)
        for group in alike.values():
            if len(group) > 1:
                said.append(
                    f"experts {', '.join(map(str, group))} are the same plan: the codes have collapsed, and the "
                    f"router has {len(alike)} different experts instead of {len(self.experts)}. Train with "
                    "fewer experts, longer, or with a larger spread_weight."
                )
        least = 1 / (_RARELY * len(self.experts))
        rare = [index for index, usage in enumerate(self.usage) if usage < least]
        if rare and any(self.usage):
            told = ", ".join(f"{index} ({self.usage[index]:.2%})" for index in rare)
            said.append(
                f"hardly any training prompts go to these experts: {told}; expected {least:.2%} or more each. Train "
                "with fewer experts, or on more different prompts."
            )
        return said

    def summary(self) -> dict[str, Any]:
        """The figures of `report` as JSON data."""
        return {
            "kind": self.kind,
            "host": self.base.host,
            "target": self.target,
            "trained_share": self.trained_share,
            "experts": [
                {
                    "share": expert.share,
                    "usage": expert.usage,
                    "asked": expert.plan.made_by.get("budget", {}).get("keep"),
                    "operating_point": dict(expert.plan.operating_point),
                    "fine_tuned": "lora" if expert.lora else "weights" if expert.weights else None,
                }
                for expert in self.experts
            ],
            "collapse": self.collapse(),
        }

    def report(self) -> str:
        """A table of the experts: MACs kept, share of the training prompts, and the average against its target."""
        point = ", ".join(f"{name} {value}" for name, value in self.plans[0].operating_point.items())
        lines = [f"{type(self).__name__} of {len(self.experts)} experts of {self.base.host}"]
        lines.append(f"MACs counted at {point or 'an unstated operating point'}")
        lines.append("expert   MACs  training  fine-tuned")
        for index, expert in enumerate(self.experts):
            tuned = "LoRA" if expert.lora else "weights" if expert.weights else "no"
            lines.append(f"{index:>6} {expert.share:>6.1%} {expert.usage:>9.1%}  {tuned}")
        average = "under the trained balance" if any(self.usage) else "over all experts alike"
        lines.append(f"{self.trained_share:.2%} of the dense MACs on average {average}, {self.target:.2%} asked for")
        return "\n".join([*lines, *self.collapse()])


def _checked(experts: Sequence[Expert], base: PlanBase) -> tuple[Expert, ...]:
    experts = tuple(experts)
    if not experts:
        raise GenpruneError("there are no experts; expected at least one. Pass experts=[Expert(plan), ...].")
    for index, expert in enumerate(experts):
        if not isinstance(expert, Expert):
            raise GenpruneError(
                f"expert {index} is a {type(expert).__name__}; expected an Expert. Pass Expert(plan, usage=...)."
            )
        if expert.plan.base != base:
            raise PlanMismatch(
                f"the plan of expert {index} is for {expert.plan.base.host} ({expert.plan.base.sites_sha256[:12]}), "
                f"the router for {base.host} ({base.sites_sha256[:12]}); expected one base. Make all plans on it."
            )
    if (total := sum(expert.usage for expert in experts)) > 1 + 1e-4:
        raise GenpruneError(
            f"the experts' usage sums to {total:.4f}; expected shares of the training prompts, at most 1 together. "
            "Pass counts divided by the number of prompts."
        )
    return experts


def _units(plan: PruningPlan) -> str:
    """Digest of what a plan takes away: a site that keeps all counts as one that is not named."""
    digest = hashlib.sha256(repr(plan.ops).encode())
    for name, mask in sorted(plan.keep.items()):
        if not mask.all():
            digest.update(name.encode() + mask.numpy().tobytes())
    return digest.hexdigest()
