"""Tiny stock pipelines with small routers, and each prompt drawn alone on its expert's real cut, for comparison."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from router_cases import WORDS, small_router
from torch import Tensor, nn

import genprune as gp
from genprune.families import denoiser_slot

SIZE = {"num_inference_steps": 2, "height": 16, "width": 16}
ROUNDING = 1e-4  # a batch and its rows differ by float32 rounding, over two steps and a decoder


def strong_(model: nn.Module) -> nn.Module:
    """Weights with which a cut shows in the picture."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model


def routed_parts(make, folder: Path, experts: int = 3):
    """A tiny pipeline and a router of it, whose experts all get some of `WORDS`."""
    pipe = make(folder)
    strong_(getattr(pipe, denoiser_slot(pipe)))
    pipe.set_progress_bar_config(disable=True)
    router = small_router(pipe, experts)
    assert len(set(router.route(WORDS).experts)) > 1
    return pipe, router


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


class Alone:
    """Really cut stock pipelines, one for each expert, made by `gp.cut` before anything was routed."""

    def __init__(self, pipe, router):
        self.router, self.pipes, slot = router, [], denoiser_slot(pipe)
        for plan in router.plans:
            small = copy.copy(pipe)
            small.__dict__[slot] = gp.cut(copy.deepcopy(getattr(pipe, slot)), plan)
            self.pipes.append(small)

    def draw(self, prompt: str, seeds: tuple[int, ...], expert: int | None = None, **kwargs: Any) -> Tensor:
        expert = self.router.route(prompt).experts[0] if expert is None else expert
        given = {**SIZE, "output_type": "latent", **kwargs, "num_images_per_prompt": len(seeds)}
        return self.pipes[expert](prompt, generator=seeded(*seeds), **given).images
