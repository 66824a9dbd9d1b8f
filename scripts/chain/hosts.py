"""Full-size and moderate hosts with random weights: for cost, memory and speed, never for quality."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "block_out_channels": (320, 640, 1280, 1280)}
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# FLUX's blocks at a quarter of its width and an eighth of its depth: 2 double and 4 single blocks.
FLUX_MODERATE = {
    "num_layers": 2,
    "num_single_layers": 4,
    "num_attention_heads": 8,
    "attention_head_dim": 128,
    "joint_attention_dim": 1024,
    "pooled_projection_dim": 768,
}


@dataclass(frozen=True)
class Host:
    """One model to measure.

    Args:
        name: in the result.
        build: makes it on the device and dtype in force.
        point: fields of the operating point that are not the family's default, in `find_sites` terms.
        quick_point: a smaller one for `--quick`.
    """

    name: str
    build: Callable[[], nn.Module]
    point: dict[str, int]
    quick_point: dict[str, int]


def _unet(config: dict) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**config)


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(**FLUX_MODERATE)


def _vit() -> nn.Module:
    import timm

    return timm.create_model("deit_small_patch16_224", pretrained=False)


HOSTS = {
    "sd15": Host("sd15", lambda: _unet(SD15), {}, {}),
    "sdxl": Host("sdxl", lambda: _unet(SDXL), {}, {}),
    "unet": Host("unet", lambda: _unet(SD15), {"height": 32, "width": 32}, {"height": 16, "width": 16}),
    "dit": Host(
        "dit", _flux, {"height": 32, "width": 32, "text_length": 128}, {"height": 16, "width": 16, "text_length": 64}
    ),
    "vit": Host("vit", _vit, {}, {}),
}


def random_host(name: str, dtype: torch.dtype) -> nn.Module:
    """The host on the CPU with small random weights, built without a second copy in memory."""
    with torch.device("meta"):
        model = HOSTS[name].build()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device="cpu")
    fill_(model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def fill_(model: nn.Module, seed: int = 0) -> None:
    """Fill every tensor from one seeded buffer of a million normal values: seconds where fresh draws take minutes."""
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed)) * 0.02
    for tensor in [*model.parameters(), *model.buffers()]:
        if not tensor.is_floating_point():
            tensor.zero_()
            continue
        flat = tensor.view(-1)
        values = noise.to(tensor.dtype)
        for start in range(0, flat.numel(), values.numel()):
            piece = flat[start : start + values.numel()]
            piece.copy_(values[: piece.numel()])
    for module in model.modules():  # norms keep their scale, so that activations stay finite through deep models
        if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            module.weight.fill_(1.0)
