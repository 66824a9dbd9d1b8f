"""Narrow U-Nets with all the layers of Stable Diffusion and SDXL, one batch for them, and their outputs."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tiny_hosts import sd_unet
from torch import Tensor, nn

from genprune.families import family_of

SD = {
    "block_out_channels": (8, 16, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
}
SD2 = SD | {"attention_head_dim": [1, 2, 4, 4], "use_linear_projection": True}
SDXL = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "attention_head_dim": (1, 2, 4),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}

# Parameters and MACs at 64x64 (SD) and 128x128 (SDXL) latent pixels, 77 text tokens.
COUNTS = {
    "bk-sdm-base": (579_384_964, 261_496_995_840),
    "bk-sdm-small": (482_346_884, 255_447_203_840),
    "bk-sdm-tiny": (323_384_964, 242_754_519_040),
    "koala-1b": (1_161_184_324, 1_715_914_178_560),
    "koala-700m": (782_822_724, 1_350_757_416_960),
    "ssd-1b": (1_331_334_404, 2_103_880_908_800),
    "vega": (745_225_604, 1_411_220_439_040),
}


def unet(**config: Any) -> nn.Module:
    """A U-Net whose norms and biases say something."""
    model = sd_unet(**config)
    source = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=source))
    return model.eval()


@cache
def dense(name: str) -> nn.Module:
    """Built once a session: never changed."""
    return unet(**{"sd": SD, "sd2": SD2, "sdxl": SDXL}[name])


def inputs(model: nn.Module, height: int = 8, width: int = 8) -> dict[str, Any]:
    family = family_of(model)
    text = {} if family.library == "timm" else {"text_length": 3}
    point = family.operating_point(model, height=height, width=width, batch=2, **text)
    torch.manual_seed(3)
    return family.example_inputs(model, point, "cpu", torch.float32)


@torch.no_grad()
def run(model: nn.Module, given: dict[str, Any]) -> Tensor:
    output = model(**given)
    return output if isinstance(output, Tensor) else output.sample


def difference(left: Tensor, right: Tensor) -> float:
    """Relative difference of two tensors (2-norm, over that of the left one)."""
    return float((left - right).norm() / left.norm())
