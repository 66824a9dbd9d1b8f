"""Tiny denoisers of every family and their inputs, for the tests of tokens in diffusion."""

from __future__ import annotations

import torch
from tiny_hosts import dit, flux, pixart, sd3, sd_unet, sdxl_unet
from torch import nn

from genprune.costs import operating_point
from genprune.families import family_of

BUILDERS = {"dit": dit, "pixart": pixart, "sd3": sd3, "flux": flux, "sd": sd_unet, "sdxl": sdxl_unet}
# Latent pixels; U-Nets with other height than width. DiT makes squares only.
POINTS = {
    "dit": {"height": 16, "width": 16},
    "pixart": {"height": 12, "width": 16, "text_length": 5},
    "sd3": {"height": 12, "width": 16, "text_length": 5},
    "flux": {"height": 12, "width": 16, "text_length": 5},
    "sd": {"height": 8, "width": 12, "text_length": 5},
    "sdxl": {"height": 8, "width": 12, "text_length": 5},
}
TRANSFORMERS = ("dit", "pixart", "sd3", "flux")
UNETS = ("sd", "sdxl")
FAMILIES = (*TRANSFORMERS, *UNETS)
LATENTS = dict.fromkeys(TRANSFORMERS, "hidden_states") | dict.fromkeys(UNETS, "sample")


def denoiser(family: str, **changes) -> nn.Module:
    """A model whose zero-initialised parts are random too, so that no error hides."""
    model = BUILDERS[family](**changes)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def inputs_of(model: nn.Module, family: str, batch: int = 2, **point) -> dict:
    """Keyword arguments of a call; every row has other latents."""
    torch.manual_seed(2)
    at = operating_point(model, **{**POINTS[family], **point, "batch": batch})
    found = family_of(model).example_inputs(model, at, "cpu", torch.float32)
    if family == "dit":
        found["class_labels"] = torch.arange(batch) % 10
    return found


def guided(model: nn.Module, family: str) -> dict:
    """Inputs of classifier-free guidance: two halves with the same latents and other conditions."""
    found = inputs_of(model, family, batch=4)
    latents = found[LATENTS[family]]
    found[LATENTS[family]] = torch.cat([latents[:2], latents[:2]])
    return found


@torch.no_grad()
def run(model: nn.Module, inputs: dict) -> torch.Tensor:
    return model(**inputs, return_dict=False)[0]


def hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
