"""`DepthScores`: how likely each layer is to be kept, and the decision; serves plans for every budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from genprune.costs import Costs, SiteCosts
from genprune.masks.depth_gates import most_likely
from genprune.plan import PlanBase, PruningPlan
from genprune.sites import effective_keep


@dataclass(frozen=True)
class DepthScores:
    """Outcome of one training of layer choices, and what it takes to plan without the model.

    Attributes:
        values: site name -> probability of being kept, float tensor of shape `(1,)` in [0, 1]; 1 where protected.
        decisions: layers of a group -> those that stay, for every group that was trained or had no choice.
        method: its budget and groups are the defaults of `plan`.
        base: the model that they are for.
        costs: of that model as it is, with its sites.
        dense: of the dense model, which budgets count against.
        made_by: method, settings, and what was trained on; `depth` holds groups and decisions.
    """

    values: Mapping[str, Tensor] = field(repr=False)
    decisions: Mapping[tuple[str, ...], tuple[str, ...]] = field(repr=False)
    method: Any
    base: PlanBase
    costs: SiteCosts = field(repr=False)
    dense: Costs
    made_by: Mapping[str, Any] = field(default_factory=dict)

    def plan(self, keep: float | None = None, of: str | None = None, **changes: Any) -> PruningPlan:
        """The plan of the decision; no model is needed.

        With another budget, groups or protected layers, groups that were trained keep their decision; in others the
        layers of the highest probabilities stay.

        Args:
            keep: share of the whole dense denoiser that stays, in (0, 1].
            of: `params`, `macs`, or `units` (layers).
            changes: other fields of the method: `groups`, `group_size`, `protect`.

        Raises:
            BudgetUnreachable: no numbers of layers meet the budget. NoMatchingSites: a pattern matches nothing.
            GenpruneError: a value out of range.
        """
        given = {name: value for name, value in {"keep": keep, "of": of}.items() if value is not None} | changes
        method = self.method.changed(**given)
        kinds = tuple(dict.fromkeys(self.costs.sites[name].kind for name in self.values))
        values = {name: float(value) for name, value in self.values.items()}
        masks: dict[str, Tensor] = {}
        for group in method.depth_groups(self.costs, self.dense, kinds):
            stay = self.decisions.get(group.layers, ())
            if len(stay) != group.kept:  # not what was trained for
                stay = most_likely(group, values)
            masks |= {name: torch.tensor([name in stay]) for name in group.layers}
        left = self.costs.predict(masks)
        if method.of == "units":
            reached = 1 - sum(not mask.any() for mask in masks.values()) / len(values)
        else:
            reached = getattr(left, method.of) / getattr(self.dense, method.of)
        asked = reached if method.keep is None else method.keep
        return PruningPlan(
            base=self.base,
            keep=effective_keep(self.costs.sites, masks),
            operating_point=asdict(self.dense.operating_point),
            figures={
                "dense_params": self.dense.params,
                "params": left.params,
                "dense_macs": self.dense.macs,
                "macs": left.macs,
            },
            made_by={
                **self.made_by,
                "settings": method.to_json(),
                "kinds": list(kinds),
                "budget": {"keep": asked, "of": method.of, "reached": reached},
            },
        )
