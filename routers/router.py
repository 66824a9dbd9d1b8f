"""`PromptRouter`: which expert a prompt goes to. Noise-free, on the CPU, one prompt at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from genprune.plan import PlanBase, PruningPlan
from genprune.routers.experts import Expert


class PromptRouter:
    """Sends each prompt to one of K experts (APTP)."""

    kind = "prompt"

    def __init__(
        self,
        encoder,
        space,
        predictor,
        codes: Tensor,
        experts: Sequence[Expert],
        *,
        base: PlanBase,
        training: Mapping[str, Any],
        familiarity=None,
        weights_fingerprint: str | None = None,
        shift: float = 0.0,
        made_by: Mapping[str, Any] | None = None,
    ) -> None:
        self.encoder, self.space, self.predictor, self.codes = encoder, space, predictor, codes
        self.experts, self.base, self.training = tuple(experts), base, dict(training)
        self.familiarity, self.weights_fingerprint = familiarity, weights_fingerprint
        self.shift, self.made_by = shift, dict(made_by or {})

    @property
    def plans(self) -> tuple[PruningPlan, ...]:
        return tuple(expert.plan for expert in self.experts)
