"""Stock pipelines around denoisers with random weights: for memory and time, never for quality."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import genprune as gp
from genprune.denoising import draw_latents
from genprune.families import denoiser, family_of
from genprune.gates import attach_gates
from scripts.chain.hosts import SD15, fill_

SEED = 0  # of the starting noise
# SD 1.5 at a fifth of its width, so that ten steps of plain backpropagation fit into a small machine.
NARROW_SD15 = SD15 | {"block_out_channels": (64, 128, 256, 256), "cross_attention_dim": 256, "attention_head_dim": 4}
FLUX_SMALL = {
    "num_layers": 4,
    "num_single_layers": 8,
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "joint_attention_dim": 256,
    "pooled_projection_dim": 64,
    "axes_dims_rope": (16, 24, 24),
    "guidance_embeds": True,
}


@dataclass(frozen=True, eq=False)
class Host:
    """A pipeline without text encoders and VAE, and what to call it with.

    Args:
        pipe: the pipeline.
        options: of `draw_latents`, one row.
        rows: of the denoiser's input: two under classifier-free guidance.
    """

    pipe: Any
    options: dict[str, Any] = field(repr=False)
    rows: int

    @property
    def sample_argument(self) -> str:
        return family_of(denoiser(self.pipe)).sample_argument

    @functools.cached_property
    def call(self) -> dict[str, Any]:
        """What the pipeline calls its denoiser with in the first step."""
        seen = []

        def hook(module, args, kwargs):
            seen.append(dict(zip((self.sample_argument, "timestep"), args)) | kwargs)

        with denoiser(self.pipe).register_forward_pre_hook(hook, with_kwargs=True):
            draw_latents(self.pipe, seeds=[SEED], num_inference_steps=1, **self.options)
        return {name: value for name, value in seen[0].items() if name != "return_dict"}


def build_host(name: str, latent_size: int, device: str) -> Host:
    """One of "unet", "dit" and "sd15", in float32."""
    make = _flux if name == "dit" else _stable_diffusion
    host = make(name, latent_size, device)
    model = denoiser(host.pipe).to(device).eval()
    fill_(model)
    return host


def _random(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)


def _stable_diffusion(name: str, latent_size: int, device: str) -> Host:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    config = SD15 if name == "sd15" else NARROW_SD15
    solver = DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(
        **parts, unet=UNet2DConditionModel(**config), scheduler=solver, requires_safety_checker=False
    )
    text = _random(1, 77, config["cross_attention_dim"], device=device)
    options = {
        "prompt_embeds": text,
        "negative_prompt_embeds": text.flip(1),
        "guidance_scale": 7.5,
        "height": 8 * latent_size,
        "width": 8 * latent_size,
    }
    return Host(pipe, options, rows=2)


def _flux(name: str, latent_size: int, device: str) -> Host:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(
        **parts, transformer=FluxTransformer2DModel(**FLUX_SMALL), scheduler=FlowMatchEulerDiscreteScheduler()
    )
    options = {
        "prompt_embeds": _random(1, 128, FLUX_SMALL["joint_attention_dim"], device=device),
        "pooled_prompt_embeds": _random(1, FLUX_SMALL["pooled_projection_dim"], device=device),
        "height": 8 * latent_size,
        "width": 8 * latent_size,
    }
    return Host(pipe, options, rows=1)


class SigmoidGates:
    """sigmoid(logit + noise of the step) on every head and neuron: gates that differ from step to step."""

    def __init__(self, pipe):
        sites = {name: site for name, site in gp.find_sites(pipe).items() if site.kind in ("heads", "neurons")}
        device = next(denoiser(pipe).parameters()).device
        self.logits = {name: torch.full((site.size,), 3.0, device=device) for name, site in sites.items()}
        self.handle = attach_gates(pipe, self.logits)
        for logit in self.logits.values():
            logit.requires_grad_()

    def parameters(self) -> list[Tensor]:
        return list(self.logits.values())

    def set_step(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for name, logit in self.logits.items():
            noise = torch.randn(logit.shape, generator=generator).to(logit.device)
            self.handle[name] = torch.sigmoid(logit + noise)


def weight_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
