"""`LayerScores`: what each change of a layer loses and saves, from one scoring run; serves plans for every budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from genprune.allocation.knapsack import Demand, Knapsack
from genprune.costs import Costs, SiteCosts
from genprune.errors import BudgetUnreachable, GenpruneError
from genprune.layers.additivity import Additivity
from genprune.layers.candidates import Candidate
from genprune.layers.constraints import allowed, limits
from genprune.layers.greedy import Removal, merged
from genprune.plan import PlanBase, PruningPlan
from genprune.sites import effective_keep

TOLERANCE = 0.005  # of the dense model: the miss that is never an error
# What a plan may change of the method that scored: the rest is in the losses already.
PLANNED = ("keep", "of", "also", "kinds", "protect", "protect_first", "max_consecutive", "n_of_m")


@dataclass(frozen=True)
class LayerScores:
    """Losses of candidates, and what it takes to plan without the model.

    Attributes:
        losses: candidate's name -> what the output loses under it alone; lower = goes first.
        candidates: by name: removals, and operators where the method offers them.
        method: its budgets and constraints are the defaults of `plan`.
        base: the model that they are for.
        costs: of that model as it is, with its sites.
        dense: of the dense model, which budgets count against.
        made_by: method, settings, and what was scored on.
        dense_latency: milliseconds of one call of the dense model, where latency was measured.
        additivity: whether single losses add up, where it was measured.
        order: greedy removals, each scored with the ones before it gone; None where single losses are what counts.
    """

    losses: Mapping[str, float] = field(repr=False)
    candidates: Mapping[str, Candidate] = field(repr=False)
    method: Any
    base: PlanBase
    costs: SiteCosts = field(repr=False)
    dense: Costs
    made_by: Mapping[str, Any] = field(default_factory=dict)
    dense_latency: float | None = None
    additivity: Additivity | None = None
    order: tuple[Removal, ...] | None = None

    def plan(self, keep: float | None = None, of: str | None = None, **changes: Any) -> PruningPlan:
        """The plan for a budget; no model is needed.

        Args:
            keep: share of the whole dense denoiser that stays, in (0, 1].
            of: `params`, `macs`, or `latency` where it was measured.
            changes: other fields of the method: `also` (more budgets), `kinds` (among those scored), `protect`,
                `max_consecutive`, `n_of_m`, ...

        Raises:
            BudgetUnreachable: names the budget or constraint that binds. GenpruneError: a value out of range.
        """
        given = {name: value for name, value in {"keep": keep, "of": of}.items() if value is not None} | changes
        method = self.method.changed(**given)
        if fixed := [n for n in given if n not in PLANNED and getattr(method, n) != getattr(self.method, n)]:
            raise GenpruneError(
                f"{fixed[0]}={given[fixed[0]]!r} changes how layers are scored, and these were scored with "
                f"{getattr(self.method, fixed[0])!r}; expected some of {', '.join(PLANNED)}. Score again with it."
            )
        sites = self.costs.sites
        candidates = method.eligible(self.candidates.values(), sites, self.base.host)
        chosen = self._greedy(method, candidates) if self.order is not None else self._exact(method, candidates)
        return self._plan_of(method, chosen)

    def _total(self, quantity: str) -> tuple[float, float]:
        """The dense model's cost in a quantity, and what the model as it is costs."""
        if quantity != "latency":
            return getattr(self.dense, quantity), getattr(self.costs.total, quantity)
        if self.dense_latency is None:
            raise GenpruneError(
                "a budget on latency needs measured layers, and none were timed; expected scores made for one. Score "
                f"again with gp.{type(self.method).__name__}(of='latency') or also=(('latency', keep),)."
            )
        return self.dense_latency, self.dense_latency

    def _demands(self, method, candidates: Sequence[Candidate], under: float, over: float) -> dict[str, Demand]:
        """What has to go, in shares of the dense model; the main budget within `under` and `over`."""
        demands = {}
        for quantity, keep in method.budgets().items():
            dense, now = self._total(quantity)
            asked = now / dense - keep
            if asked < -TOLERANCE:
                raise BudgetUnreachable(
                    f"keep={keep:g} of {quantity} is more than this model has: {now / dense:.3f} of the dense one is "
                    f"left. Pass a keep of at most {now / dense:.3f}, or start from the dense model."
                )
            saves = tuple(candidate.saves[quantity] / dense for candidate in candidates)
            is_main = quantity == method.of
            demands[quantity] = Demand(
                saves, max(asked - (under if is_main else TOLERANCE), 0.0), asked + over if is_main else float("inf")
            )
        return demands

    def _exact(self, method, candidates: list[Candidate]) -> list[Candidate]:
        """The set of least summed loss; as near to the budget as its steps allow."""
        rules = limits(candidates, self.costs.sites, method.neighbours(self.base.host), method.n_of_m)
        losses = tuple(self.losses[candidate.name] for candidate in candidates)
        dense, _ = self._total(method.of)
        smallest = min((c.saves[method.of] / dense for c in candidates if c.saves[method.of] > 0), default=0.0)
        half = max(TOLERANCE, smallest / 2)
        unreachable = None
        # Within the tolerance or half the smallest layer; else the cheapest set that saves enough.
        for under, over in ((half, half), (TOLERANCE, smallest), (TOLERANCE, float("inf"))):
            problem = Knapsack(losses, self._demands(method, candidates, under, over), rules)
            try:
                return [candidates[index] for index in problem.solve()]
            except BudgetUnreachable as error:
                unreachable = error
        raise unreachable

    def _greedy(self, method, candidates: list[Candidate]) -> list[Candidate]:
        """The order's layers, one after the other, those that would overshoot left out unless another budget asks."""
        if method.n_of_m is not None:
            raise GenpruneError(
                f"n_of_m={method.n_of_m} fixes how many blocks of a group go, which a greedy order cannot hold to; "
                "expected None. Score again with n_of_m or selection='knapsack', or pass max_consecutive."
            )
        self._demands(method, candidates, TOLERANCE, float("inf"))  # refuses more than the model has
        rules = limits(candidates, self.costs.sites, method.neighbours(self.base.host))
        names = [candidate.name for candidate in candidates]
        by_name = {candidate.name: candidate for candidate in candidates}
        dense, _ = self._total(method.of)
        taken: list[Candidate] = []

        def left(chosen: Sequence[Candidate]) -> float:
            return self._reached(method.of, chosen)

        for removal in self.order:
            if removal.name not in by_name:
                continue
            after = merged(taken, by_name[removal.name])
            if allowed(after, rules, names) and left(after) >= method.keep - TOLERANCE:
                taken = after
        if left(taken) > method.keep + TOLERANCE:  # one step further, where that comes nearer
            for removal in self.order:
                after = merged(taken, by_name[removal.name]) if removal.name in by_name else taken
                nearer = abs(left(after) - method.keep) < abs(left(taken) - method.keep)
                if nearer and allowed(after, rules, names):
                    taken = after
                    break
        short = left(taken) - method.keep
        steps = [c.saves[method.of] / dense for c in candidates if c.saves[method.of] > 0]
        if short > max(TOLERANCE, max(steps, default=0.0) / 2):
            raise BudgetUnreachable(
                f"the greedy order of {len(self.order)} layers ends at {left(taken):.3f} of {method.of}; asked for "
                f"{method.keep:g}. Score again with keep={method.keep:g}: the walk stops at the budget that it is "
                "given."
            )
        return self._further(method, taken, by_name, rules, names)

    def _further(self, method, taken: list[Candidate], by_name: Mapping[str, Candidate], rules, names):
        """More of the order, until the budgets beside the main one are met as well."""
        for quantity, keep in dict(method.also).items():
            for removal in self.order:
                if self._reached(quantity, taken) <= keep + TOLERANCE:
                    break
                after = merged(taken, by_name[removal.name]) if removal.name in by_name else taken
                if self._reached(quantity, after) < self._reached(quantity, taken) and allowed(after, rules, names):
                    taken = after
            if (reached := self._reached(quantity, taken)) > keep + TOLERANCE:
                raise BudgetUnreachable(
                    f"the greedy order of {len(self.order)} layers ends at {reached:.3f} of {quantity}; asked for "
                    f"{keep:g}. Score again with also=(('{quantity}', {keep:g}),): the walk stops at the budgets that "
                    "it is given."
                )
        return taken

    def _plan_of(self, method, chosen: Sequence[Candidate]) -> PruningPlan:
        keep: dict[str, Tensor] = {}
        tensors: dict[str, Tensor] = {}
        for candidate in chosen:
            keep |= candidate.keep
            tensors |= candidate.tensors
        left = {
            quantity: getattr(self.costs.total, quantity) - round(sum(c.saves[quantity] for c in chosen))
            for quantity in ("params", "macs")
        }
        figures = {"dense_params": self.dense.params, "params": left["params"]}
        figures |= {"dense_macs": self.dense.macs, "macs": left["macs"]}
        reached = {q: self._reached(q, chosen) for q in method.budgets()}
        budget = {"keep": method.keep, "of": method.of, "reached": reached[method.of]}
        notes: dict[str, Any] = {"budget": budget, "layers": [candidate.name for candidate in chosen]}
        notes["losses"] = {candidate.name: self.losses.get(candidate.name) for candidate in chosen}
        if len(reached) > 1:
            notes["budgets"] = {q: {"keep": k, "reached": reached[q]} for q, k in method.budgets().items()}
        if self.additivity is not None:
            notes["additivity"] = self.additivity.to_json()
        notes["selection"] = "knapsack" if self.order is None else "greedy"
        return PruningPlan(
            base=self.base,
            keep=effective_keep(self.costs.sites, keep),
            ops=tuple(op for candidate in chosen for op in candidate.ops),
            tensors=tensors,
            operating_point=asdict(self.dense.operating_point),
            figures=figures,
            made_by={**self.made_by, "settings": method.to_json(), **notes},
        )

    def _reached(self, quantity: str, chosen: Sequence[Candidate]) -> float:
        dense, now = self._total(quantity)
        return (now - sum(candidate.saves[quantity] for candidate in chosen)) / dense

    def scaled_latency(self, factor: float) -> LayerScores:
        """The same with every layer's saved time multiplied: what single layers save is not all that a model saves."""
        scaled = {
            name: replace(c, saves={**c.saves, "latency": c.saves.get("latency", 0.0) * factor})
            for name, c in self.candidates.items()
        }
        return replace(self, candidates=scaled)

    def __str__(self) -> str:
        ranked = sorted(self.losses, key=self.losses.get)
        dense = self.dense
        lines = [f"{self.method.name}: {len(ranked)} layers scored, the least missed first"]
        for name in ranked[:20]:
            saves = self.candidates[name].saves
            shares = ", ".join(f"{saves[q] / getattr(dense, q):.2%} of {q}" for q in ("params", "macs"))
            lines.append(f"  {self.losses[name]:.4g}  {name} ({shares})")
        if len(ranked) > 20:
            lines.append(f"  ... {len(ranked) - 20} more")
        if self.additivity is not None:
            lines.append(str(self.additivity))
        if self.order is not None:
            lines.append(f"greedy order of {len(self.order)} layers")
        return "\n".join(lines)
