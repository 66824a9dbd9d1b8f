"""Pipelines and gates for the tests of the differentiable chain: one row for each kind of solver and guidance."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny_hosts import sdxl_unet
from tiny_pipelines import clip_text, clip_tokenizer, ddpm_pipeline, dit_pipeline, flux_pipeline, sd3_pipeline, vae
from tiny_pipelines import sd_pipeline as ddim_pipeline
from torch import Tensor

import genprune as gp
from genprune.denoising import draw_latents
from genprune.denoising.capture import takes_prompts
from genprune.gates import attach_gates


class NoisyGates:
    """sigmoid(logit + noise of the step) on every head, neuron and modulation gate."""

    def __init__(self, pipe, noise: float = 1.0):
        sites = gp.find_sites(pipe)
        self.names = [name for name, site in sites.items() if site.kind in ("heads", "neurons", "modulation")]
        self.handle = attach_gates(pipe, {name: torch.ones(sites[name].size) for name in self.names}, sites)
        generator = torch.Generator().manual_seed(5)
        self.logits = [
            (2 + torch.randn(sites[name].size, generator=generator)).requires_grad_() for name in self.names
        ]
        self.noise = noise
        self.steps_set: list[int] = []

    def parameters(self) -> list[Tensor]:
        return self.logits

    def set_step(self, step: int) -> None:
        self.steps_set.append(step)
        generator = torch.Generator().manual_seed(1000 + step)
        for name, logit in zip(self.names, self.logits):
            drawn = torch.randn(logit.shape, generator=generator)
            self.handle[name] = self.value(logit, self.noise * drawn)

    def value(self, logit: Tensor, drawn: Tensor) -> Tensor:
        return torch.sigmoid(logit + drawn)

    def __enter__(self) -> NoisyGates:
        return self

    def __exit__(self, *error) -> None:
        self.handle.remove()


class OpenGates(NoisyGates):
    """Gates of exactly one, with a gradient."""

    def value(self, logit: Tensor, drawn: Tensor) -> Tensor:
        return logit - logit.detach() + 1


@dataclass(frozen=True)
class Case:
    build: Callable
    options: dict[str, Any] = field(default_factory=dict)
    calls_per_step: int = 1
    calls: int = 3  # of a run


def solver(name: str, **config):
    def build(folder):
        import diffusers

        cls = getattr(diffusers, name)
        quiet = {"steps_offset": 1, "clip_sample": False}  # what the pipeline wants, with a warning otherwise
        known = inspect.signature(cls.__init__).parameters
        return ddim_pipeline(folder, cls(**{k: v for k, v in quiet.items() if k in known}, **config))

    return build


def sdxl_pipeline(folder):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip_text(8),
        tokenizer=clip_tokenizer(folder),
        text_encoder_2=clip_text(16, 16),
        tokenizer_2=clip_tokenizer(folder),
        unet=sdxl_unet().eval(),
        scheduler=EulerDiscreteScheduler(),
    )


def unconditional_pipeline(folder):
    from diffusers import DDIMPipeline, DDIMScheduler

    return DDIMPipeline(ddpm_pipeline().unet, DDIMScheduler(num_train_timesteps=100))


SIZE = {"height": 16, "width": 16}
TRUE_CFG = {"true_cfg_scale": 2.0, "negative_prompt": "bad", "max_sequence_length": 16} | SIZE
CASES = {
    "ddim": Case(ddim_pipeline, SIZE),
    "ddim without guidance": Case(ddim_pipeline, {"guidance_scale": 1.0} | SIZE),
    "euler": Case(solver("EulerDiscreteScheduler"), SIZE),
    "dpm++ 2m": Case(solver("DPMSolverMultistepScheduler"), {"num_inference_steps": 4} | SIZE, calls=4),
    "unipc": Case(solver("UniPCMultistepScheduler"), {"num_inference_steps": 4} | SIZE, calls=4),
    "pndm": Case(solver("PNDMScheduler", skip_prk_steps=True), SIZE, calls=4),
    "heun": Case(solver("HeunDiscreteScheduler"), SIZE, calls=5),
    "euler ancestral": Case(solver("EulerAncestralDiscreteScheduler"), SIZE),
    "ddpm": Case(solver("DDPMScheduler"), SIZE),
    "lcm": Case(solver("LCMScheduler"), {"guidance_scale": 1.0} | SIZE),
    "sdxl": Case(sdxl_pipeline, {"negative_prompt": "bad"} | SIZE),
    "sd3": Case(sd3_pipeline, {"max_sequence_length": 16} | SIZE),
    "flux": Case(flux_pipeline, {"max_sequence_length": 16} | SIZE),
    "flux true guidance": Case(flux_pipeline, TRUE_CFG, calls_per_step=2),
    "unconditional ddpm": Case(lambda folder: ddpm_pipeline()),
    "unconditional ddim": Case(unconditional_pipeline),
    "dit": Case(lambda folder: dit_pipeline(), {"class_labels": [0, 1]}),
}


def drawn(pipe, case: Case, seeds: Sequence[int] = (3, 4), **more) -> Tensor:
    """`draw_latents` of a case, two rows."""
    prompts = ["a cat", "two dogs"][: len(seeds)] if takes_prompts(pipe) else None
    options = {"num_inference_steps": 3} | case.options | more
    return draw_latents(pipe, prompts, seeds=seeds, **options)


def target_of(latents: Tensor) -> Tensor:
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(9))


def gradients(pipe, case: Case, gates, **more) -> tuple[Tensor, list[Tensor]]:
    """Final latents, and the gradient of a squared error by each logit."""
    latents = drawn(pipe, case, gates=gates, **more)
    loss = (latents.float() - target_of(latents)).square().mean()
    return latents.detach(), list(torch.autograd.grad(loss, gates.parameters()))


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    one, other = (torch.cat([tensor.double().flatten() for tensor in both]) for both in (found, expected))
    return float((one - other).norm() / other.norm())
