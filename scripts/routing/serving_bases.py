"""What is served: a miniature, and the same pipeline around a larger U-Net with random weights; experts, a router."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import genprune as gp
from genprune import miniature
from genprune.families import denoiser
from genprune.routers.architecture import ArchitectureSpace
from genprune.routers.encoders import encoder_of
from genprune.routers.experts import Expert
from genprune.routers.predictor import ArchitecturePredictor
from genprune.routers.router import PromptRouter

EXPERTS = 8
LARGE = {  # about 400 MB in float32
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (160, 320, 640),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 128,
    "attention_head_dim": 8,
}


@dataclass(frozen=True)
class Served:
    """A pipeline to serve.

    Args:
        name: in the results.
        load: the dense pipeline.
        options: of a call.
        quick: options that differ in a quick run.
        own_encoder: whether its router reads with the pipeline's own text encoder, the default offline; a sentence
            encoder is larger than a miniature's denoiser.
        rounds: timed calls of each way.
        stores: ways that are timed beside the groups by themselves.
    """

    name: str
    load: Callable[[], Any] = field(repr=False)
    options: dict[str, Any]
    quick: dict[str, Any]
    own_encoder: bool = False
    rounds: int = 5
    stores: tuple[str, ...] = ("reordered", "materialised")

    def call_options(self, quick: bool) -> dict[str, Any]:
        return {**self.options, **(self.quick if quick else {}), "output_type": "latent"}


def served() -> tuple[Served, ...]:
    """Miniature A and a larger U-Net as they are drawn, and that one at a fifth of the work: switches count more."""
    drawn = {"num_inference_steps": 20, "guidance_scale": 3.5}
    few = {"num_inference_steps": 8, "guidance_scale": 1.0}
    return (
        Served("miniature", miniature_pipeline, drawn, {"num_inference_steps": 4}, own_encoder=True),
        Served("large", large_pipeline, drawn, {"num_inference_steps": 2}, rounds=2, stores=("reordered",)),
        Served("large, few steps", large_pipeline, few, {"num_inference_steps": 2}),
    )


def miniature_pipeline() -> Any:
    pipe = miniature.load_pipeline("unet")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def large_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(**LARGE).eval()


def large_pipeline() -> Any:
    """The miniature's text encoder, decoder and sampler around the larger U-Net."""
    pipe = miniature_pipeline()
    pipe.unet = large_unet()
    return pipe


def experts(target: Any, count: int = EXPERTS) -> list[Expert]:
    """Experts at 50 to 70 % of the MACs, by magnitude and at random in turns."""
    found = []
    for index in range(count):
        keep = 0.5 + 0.2 * index / max(1, count - 1)
        method = gp.Random(keep=keep, of="macs", seed=index) if index % 2 else gp.Magnitude(keep=keep, of="macs")
        found.append(Expert(gp.make_plan(target, method, progress=False), usage=1 / count))
    return found


def untrained_router(pipe: Any, chosen: list[Expert], prompts: list[str], encoder: str | None) -> PromptRouter:
    """A router of the trained kind's cost, whose codes are those of prompts that are far from each other.

    Args:
        encoder: folder of a sentence encoder; None: the pipeline's own text encoder.
    """
    reader, space = encoder_of(encoder, pipe), ArchitectureSpace.of(pipe)
    torch.manual_seed(0)
    predictor = ArchitecturePredictor(reader.dim, space.lengths)
    embeddings = reader.encode(prompts)
    predictor.standardise(embeddings)
    with torch.no_grad():
        predictor.linear.weight.mul_(8)  # an untrained predictor says nearly the same of every prompt
        logits = predictor(embeddings)
        features = torch.stack([space.features(each) for each in logits])
        picked = [0]
        while len(picked) < len(chosen):
            nearest = (features @ features[picked].T).max(1).values
            picked.append(int(nearest.argmin()))
    base = gp.plan_base(denoiser(pipe))
    return PromptRouter(
        reader, space, predictor, logits[picked], chosen, base=base, training={"keep": 0.6, "of": "macs"}
    )


def cut_pipelines(pipe: Any, plans: list[gp.PruningPlan]) -> list[Any]:
    """Stock pipelines with really cut denoisers, made by `gp.cut`; everything else is shared."""
    found = []
    for plan in plans:
        small = copy.copy(pipe)
        small.__dict__["unet"] = gp.cut(copy.deepcopy(pipe.unet), plan)
        found.append(small)
    return found
