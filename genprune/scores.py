"""`Scores`: the importance of every unit, from one scoring run; serves plans for every budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from genprune.allocation import default_kinds, fit
from genprune.costs import Costs, SiteCosts
from genprune.errors import NoMatchingSites
from genprune.plan import PlanBase, PruningPlan
from genprune.sites import effective_keep


@dataclass(frozen=True)
class Scores:
    """Scores of a model's units, and what it takes to plan without the model.

    Attributes:
        values: site name -> float tensor of shape `(size,)`, higher = keep.
        method: the method that made them; its budget and constraints are the defaults of `plan`.
        base: the model that they are for.
        costs: of that model as it is, with its sites.
        dense: of the dense model, which budgets count against.
        made_by: method, settings, and what was scored on.
    """

    values: Mapping[str, Tensor] = field(repr=False)
    method: Any
    base: PlanBase
    costs: SiteCosts = field(repr=False)
    dense: Costs
    made_by: Mapping[str, Any] = field(default_factory=dict)

    def plan(self, keep: float | None = None, of: str | None = None, **changes: Any) -> PruningPlan:
        """The plan for a budget; no model is needed.

        Args:
            keep: share of the whole dense denoiser that stays, in (0, 1].
            of: `params`, `macs`, or `units`.
            changes: other fields of the method: `allocation`, `kinds` (among those scored), `min_keep`, `round_to`,
                `max_width_classes`, `protect`.

        Raises:
            BudgetUnreachable: with a table of what is reachable. NoMatchingSites: a kind was not scored, or a pattern
            matches nothing. GenpruneError: a value out of range.
        """
        given = {name: value for name, value in {"keep": keep, "of": of}.items() if value is not None} | changes
        method = self.method.changed(**given)
        scored = tuple(dict.fromkeys(self.costs.sites[name].kind for name in self.values))
        kinds = method.kinds or tuple(k for k in default_kinds(self.costs.sites) if k in scored) or scored
        if unscored := [kind for kind in kinds if kind not in scored]:
            raise NoMatchingSites(
                f"no scores of kind '{unscored[0]}'; these are of {', '.join(scored)}. Score again with "
                f"kinds={tuple(kinds)}."
            )
        additive = method.facts().additive
        fitted = fit(self.values, self.costs, self.dense, method.request(kinds), additive)
        budget = {"keep": method.keep, "of": method.of, "reached": fitted.reached}
        figures = {
            "dense_params": self.dense.params,
            "params": fitted.costs.params,
            "dense_macs": self.dense.macs,
            "macs": fitted.costs.macs,
        }
        return PruningPlan(
            base=self.base,
            keep=effective_keep(self.costs.sites, fitted.keep),
            operating_point=asdict(self.dense.operating_point),
            figures=figures,
            made_by={**self.made_by, "settings": method.to_json(), "kinds": list(kinds), "budget": budget},
        )

    def of_kinds(self, *kinds: str) -> Scores:
        """The same with scores of these kinds only."""
        sites = self.costs.sites.of_kind(*kinds)
        return replace(self, values={name: value for name, value in self.values.items() if name in sites})
