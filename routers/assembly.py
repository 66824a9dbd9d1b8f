"""From what a training found to a router that can be used and saved."""

from __future__ import annotations

from typing import Any

from genprune.cutting import plan_base
from genprune.families import denoiser
from genprune.routers.experts import Expert
from genprune.routers.familiarity import Familiarity
from genprune.routers.fingerprints import weights_fingerprint
from genprune.routers.router import PromptRouter
from genprune.routers.timestep_router import TimestepRouter
from genprune.routers.training import LearnedCodes


def assembled(pipe: Any, learned: LearnedCodes, encoder: Any) -> PromptRouter | TimestepRouter:
    """The router of a training.

    Args:
        pipe: the dense pipeline that it was trained for.
        encoder: of its prompts; None where noise levels choose.
    """
    model = denoiser(pipe)
    experts = [Expert(plan, usage) for plan, usage in zip(learned.plans, learned.usage)]
    shared = {
        "base": plan_base(model),
        "training": learned.notes,
        "weights_fingerprint": weights_fingerprint(model),
        "made_by": {"method": "aptp", "settings": learned.notes["settings"]},
    }
    if learned.embeddings is None:
        return TimestepRouter(experts, learned.boundaries, **shared)
    return PromptRouter(
        encoder,
        learned.space,
        learned.predictor,
        learned.codes,
        experts,
        familiarity=Familiarity.of(learned.embeddings),
        shift=learned.shift,
        bias=learned.bias,
        **shared,
    )
