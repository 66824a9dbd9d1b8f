"""Small real routers of tiny pipelines: an untrained predictor, codes at random, plans that differ."""

from __future__ import annotations

import dataclasses

import torch

import genprune as gp
from genprune.cutting import plan_base
from genprune.families import denoiser
from genprune.routers.architecture import ArchitectureSpace
from genprune.routers.encoders import PooledTextEncoder
from genprune.routers.experts import Expert
from genprune.routers.predictor import ArchitecturePredictor
from genprune.routers.router import PromptRouter

WORDS = ["a cat", "two dogs", "red fox", "old house", "blue bird", "green tree", "tall ship", "small boat"]


def random_plan(pipe, keep: float, seed: int = 0) -> gp.PruningPlan:
    return gp.make_plan(pipe, gp.Random(keep=keep, of="units", seed=seed), progress=False)


def expert_plans(pipe, count: int) -> list[gp.PruningPlan]:
    """Plans that keep .6 to .9 of the units."""
    return [random_plan(pipe, 0.6 + 0.3 * index / max(1, count - 1), seed=index) for index in range(count)]


def small_router(pipe, count: int = 2, plans=None, **changes) -> PromptRouter:
    """A router of `count` experts that spreads `WORDS` over them."""
    encoder, space = PooledTextEncoder(pipe), ArchitectureSpace.of(pipe)
    predictor = ArchitecturePredictor(encoder.dim, space.lengths)
    embeddings = encoder.encode(WORDS)
    predictor.standardise(embeddings)
    with torch.no_grad():
        predictor.linear.weight.mul_(8)  # an untrained predictor says nearly the same of every prompt
        # the codes of some of the prompts themselves, so that each expert has at least one
        codes = predictor(embeddings[:: len(WORDS) // count][:count]).detach()
    plans = expert_plans(pipe, count) if plans is None else plans
    experts = [Expert(plan, usage=1 / count) for plan in plans]
    settings = {"base": plan_base(denoiser(pipe)), "training": {"target": 0.75, "of": "macs"}}
    return PromptRouter(encoder, space, predictor, codes, experts, **(settings | changes))


def usage_of(router, *usage: float) -> PromptRouter:
    experts = [dataclasses.replace(expert, usage=share) for expert, share in zip(router.experts, usage, strict=True)]
    return router.with_experts(experts)
