"""The table of operators: a real host module, settings, and calls of several sizes, none of them square."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Call = dict[str, Any]


@dataclass(frozen=True)
class OperatorCase:
    """One row: the operator, its settings, how to build the host module, its calls, and the weights it should have."""

    id: str
    operator: str
    settings: dict[str, Any]
    build: Callable[[], nn.Module]
    calls: Callable[[], list[Call]]
    weights: int


def host(case: OperatorCase) -> nn.Module:
    """The host module in evaluation mode, with no parameter at its initial zero or one."""
    torch.manual_seed(0)
    module = case.build().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return module


def tensors(output) -> list[Tensor | None]:
    """What a module returned, as a list."""
    return [output] if isinstance(output, Tensor) else list(output)


def cast(call: Call, dtype: torch.dtype) -> Call:
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in call.items()
    }


# ---- host modules and what they are called with ---------------------------------------------------------------------


def resnet(wide: int, out: int) -> nn.Module:
    from diffusers.models.resnet import ResnetBlock2D

    return ResnetBlock2D(in_channels=wide, out_channels=out, temb_channels=8, groups=4, output_scale_factor=1.5)


def downsample(padding: int) -> nn.Module:
    from diffusers.models.downsampling import Downsample2D

    return Downsample2D(8, use_conv=True, out_channels=8, padding=padding, name="op")


def upsample() -> nn.Module:
    from diffusers.models.upsampling import Upsample2D

    return Upsample2D(8, use_conv=True, out_channels=8)


def attention() -> nn.Module:
    from diffusers.models.attention_processor import Attention

    return Attention(12, cross_attention_dim=10, heads=3, dim_head=4)


def basic_block() -> nn.Module:
    from diffusers.models.attention import BasicTransformerBlock

    return BasicTransformerBlock(12, 3, 4, cross_attention_dim=10)


def feed_forward() -> nn.Module:
    from diffusers.models.attention import FeedForward

    return FeedForward(12)


def wrapper() -> nn.Module:
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    return Transformer2DModel(2, 4, in_channels=8, cross_attention_dim=10, norm_num_groups=4)


def flux_double() -> nn.Module:
    from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

    return FluxTransformerBlock(16, 2, 8)


def flux_single() -> nn.Module:
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

    return FluxSingleTransformerBlock(16, 2, 8)


def sd3_block(last: bool) -> nn.Module:
    from diffusers.models.attention import JointTransformerBlock

    return JointTransformerBlock(16, 2, 8, context_pre_only=last)


def vit_block() -> nn.Module:
    from timm.models.vision_transformer import Block

    return Block(12, 3)


def rms_norm() -> nn.Module:
    from diffusers.models.normalization import RMSNorm

    return RMSNorm(8, eps=1e-6)


def maps(name: str, channels: int, **more: Any) -> list[Call]:
    torch.manual_seed(1)
    return [{name: torch.randn(2, channels, *size), **more} for size in ((6, 4), (5, 9), (1, 3))]


def tokens(name: str, features: int) -> list[Call]:
    torch.manual_seed(1)
    return [{name: torch.randn(2, count, features)} for count in (5, 1)]


def resnet_calls(channels: int) -> list[Call]:
    return maps("input_tensor", channels, temb=torch.ones(2, 8))


def upsample_calls() -> list[Call]:
    return [*maps("hidden_states", 8), *maps("hidden_states", 8, output_size=(11, 7))]


def with_text(calls: list[Call]) -> list[Call]:
    return [{**call, "encoder_hidden_states": torch.randn(2, 3, 10)} for call in calls]


def wrapper_calls() -> list[Call]:
    return [{**call, "return_dict": False} for call in with_text(maps("hidden_states", 8))]


def joint_calls() -> list[Call]:
    calls = tokens("hidden_states", 16)
    more = {"encoder_hidden_states": torch.randn(2, 3, 16), "temb": torch.randn(2, 16)}
    return [{**call, **more} for call in calls]


_PAIR = [["encoder_hidden_states", 16, 16], ["hidden_states", 16, 16]]


def _linear(wide: int, out: int, name: str = "hidden_states", **more: Any) -> dict[str, Any]:
    return {"streams": [[name, wide, out]], **more}


_SINGLE = partial(nn.Linear, 12, 7)
CASES = [
    OperatorCase("low_rank", "low_rank", {"rank": 3}, _SINGLE, partial(tokens, "input", 12), 3 * (12 + 7) + 7),
    OperatorCase(
        *("low_rank-conv", "low_rank", {"rank": 3}, partial(nn.Conv2d, 8, 6, 1, bias=False)),
        *(partial(maps, "input", 8), 3 * (8 + 6)),
    ),
    OperatorCase(
        *("separable", "separable", {"multiplier": 2}, partial(nn.Conv2d, 8, 6, 3, padding=1)),
        *(partial(maps, "input", 8), 8 * 2 * (9 + 6) + 6),
    ),
    OperatorCase(
        *("separable-strided", "separable", {"multiplier": 1}, partial(nn.Conv2d, 8, 6, 3, 2, 1, bias=False)),
        *(partial(maps, "input", 8), 8 * (9 + 6)),
    ),
    OperatorCase(*("pooled-down", "pooled", {}, partial(downsample, 1), partial(maps, "hidden_states", 8), 8 * 8 + 8)),
    OperatorCase(
        *("pooled-down-unpadded", "pooled", {}, partial(downsample, 0)),
        *(lambda: maps("hidden_states", 8)[:2], 8 * 8 + 8),
    ),
    OperatorCase("pooled-up", "pooled", {}, upsample, upsample_calls, 8 * 8 + 8),
    OperatorCase("identity", "identity", {}, nn.SiLU, partial(maps, "input", 8), 0),
    OperatorCase("identity-norm", "identity", {}, partial(nn.GroupNorm, 4, 8), partial(maps, "input", 8), 0),
    OperatorCase("relu", "relu", {}, nn.GELU, partial(tokens, "input", 12), 0),
    OperatorCase("affine-group", "affine", {}, partial(nn.GroupNorm, 4, 8), partial(maps, "input", 8), 16),
    OperatorCase("affine-layer", "affine", {}, partial(nn.LayerNorm, 8), partial(tokens, "input", 8), 16),
    OperatorCase("affine-rms", "affine", {}, rms_norm, partial(tokens, "hidden_states", 8), 16),
    OperatorCase(
        *("linear-attention", "linear", _linear(12, 12), attention),
        *(lambda: with_text(tokens("hidden_states", 12)), 12 * 12 + 12),
    ),
    OperatorCase(
        *("linear-ff", "linear", _linear(12, 12), feed_forward, partial(tokens, "hidden_states", 12), 12 * 12 + 12)
    ),
    OperatorCase(
        *("linear-block", "linear", _linear(12, 12, residual=True), basic_block),
        *(lambda: with_text(tokens("hidden_states", 12)), 12 * 12 + 12),
    ),
    OperatorCase(
        *("linear-wrapper", "linear", _linear(8, 8, returns="tuple", residual=True), wrapper, wrapper_calls),
        8 * 8 + 8,
    ),
    OperatorCase(
        *("linear-resnet", "linear", _linear(12, 8, "input_tensor"), partial(resnet, 12, 8)),
        *(partial(resnet_calls, 12), 12 * 8 + 8),
    ),
    OperatorCase(
        *("linear-flux", "linear", {"streams": _PAIR, "returns": "tuple", "residual": True}, flux_double),
        *(joint_calls, 2 * (16 * 16 + 16)),
    ),
    OperatorCase(
        *("linear-sd3", "linear", {"streams": _PAIR, "returns": "tuple", "residual": True}, partial(sd3_block, False)),
        *(joint_calls, 2 * (16 * 16 + 16)),
    ),
    OperatorCase(
        *("linear-sd3-last", "linear", {"streams": [None, _PAIR[1]], "returns": "tuple"}, partial(sd3_block, True)),
        *(joint_calls, 16 * 16 + 16),
    ),
    OperatorCase(
        *("linear-flux-single", "linear", {"streams": _PAIR, "returns": "tuple", "residual": True}, flux_single),
        *(joint_calls, 2 * (16 * 16 + 16)),
    ),
    OperatorCase(
        *("linear-vit", "linear", _linear(12, 12, "x", residual=True), vit_block, partial(tokens, "x", 12)),
        12 * 12 + 12,
    ),
    OperatorCase(
        *("drop_skip", "drop_skip", {"channels": 8}, partial(resnet, 12, 8), partial(resnet_calls, 12), 0),
    ),
    OperatorCase(
        *("drop_resampler", "drop_resampler", {}, partial(downsample, 1), partial(maps, "hidden_states", 8), 0)
    ),
]
