"""Tiny timm transformers, one builder for each kind of host; weights that initialise to zero are random instead."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from genprune.tokens.methods import ZeroTPrune

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere: LayerScale, biases and position tables start at or near zero, which hides errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.5 if "table" in name or "pos" in name else 0.3
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(center + spread * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def vit(**changes) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return lively(VisionTransformer(**(SMALL | changes)))


def distilled(**changes) -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    return lively(VisionTransformerDistilled(**(SMALL | changes)))


def eva(**changes) -> nn.Module:
    from timm.models.eva import Eva

    return lively(Eva(**(SMALL | {"qkv_fused": False} | changes)))


def beit(**changes) -> nn.Module:
    from timm.models.beit import Beit

    return lively(Beit(**(SMALL | changes)))


def relpos(**changes) -> nn.Module:
    from timm.models.vision_transformer_relpos import VisionTransformerRelPos

    return lively(VisionTransformerRelPos(**(SMALL | changes)))


def naflex(**changes) -> nn.Module:
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    config = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "pos_embed_grid_size": (4, 4)}
    model = NaFlexVit(NaFlexVitCfg(**(config | changes)), num_classes=5, img_size=32)
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    return lively(model)


def sam(**changes) -> nn.Module:
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    config = SMALL | {"depth": 4, "window_size": 2, "global_attn_indexes": (1, 3), "neck_chans": 8}
    return lively(VisionTransformerSAM(**(config | changes)))


def block_of(name: str) -> type:
    from timm.models import vision_transformer, vision_transformer_relpos

    return getattr(vision_transformer, name, None) or getattr(vision_transformer_relpos, name)


ROPE = {"use_rot_pos_emb": True}

# name -> a tiny model; every law of test_timm_hosts.py holds for each
SEQUENCES = {
    "deit": lambda: vit(),
    "deit3 (LayerScale)": lambda: vit(init_values=0.1, no_embed_class=True),
    "distilled": distilled,
    "dinov2-reg4": lambda: vit(reg_tokens=4, init_values=1e-5, no_embed_class=True),
    "dinov2-giant (SwiGLU)": lambda: vit(init_values=1e-5, mlp_layer=_swiglu()),
    "clip (norm_pre)": lambda: vit(pre_norm=True, norm_layer=nn.LayerNorm),
    "siglip (attention pool)": lambda: vit(class_token=False, global_pool="map"),
    "attention pool with prefix": lambda: vit(reg_tokens=1, global_pool="map", pool_include_prefix=True),
    "prr pool": lambda: vit(global_pool="prr"),
    "gap": lambda: vit(class_token=False, global_pool="avg"),
    "gap with prefix": lambda: vit(global_pool="avg", pool_include_prefix=True),
    "gap beside a class token": lambda: vit(global_pool="avg", fc_norm=False),
    "max pool": lambda: vit(global_pool="max"),
    "mae (no head)": lambda: vit(num_classes=0),
    "qk norm": lambda: vit(qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True),
    "residual post norm": lambda: vit(block_fn=block_of("ResPostBlock"), init_values=0.1),
    "parallel scaling": lambda: vit(block_fn=block_of("ParallelScalingBlock")),
    "parallel scaling, differential": lambda: vit(block_fn=block_of("DiffParallelScalingBlock"), num_heads=2),
    "parallel things": lambda: vit(block_fn=block_of("ParallelThingsBlock")),
    "differential attention": lambda: vit(attn_layer="diff", num_heads=2),
    "dynamic size": lambda: vit(dynamic_img_size=True),
    "eva": lambda: eva(global_pool="avg"),
    "eva02 (rope)": lambda: eva(**ROPE, swiglu_mlp=True, scale_mlp=True, global_pool="token"),
    "eva02 post norm": lambda: eva(**ROPE, use_post_norm=True, swiglu_mlp=True, qkv_fused=True),
    "eva gated": lambda: eva(**ROPE, attn_type="rope"),
    "eva grouped": lambda: eva(**ROPE, attn_type="rope", num_kv_heads=1, qk_norm=True, rope_type="dinov3"),
    "dinov3": lambda: eva(
        **ROPE,
        rope_type="dinov3",
        rope_rotate_half=True,
        num_reg_tokens=4,
        no_embed_class=True,
        init_values=1e-5,
        use_abs_pos_emb=False,
        dynamic_img_size=True,
        global_pool="token",
    ),  # fmt: skip
    "rope mixed": lambda: eva(**ROPE, rope_type="mixed", global_pool="avg"),
    "perception encoder": lambda: eva(
        **ROPE,
        attn_type="rope",
        global_pool="map",
        attn_pool_num_heads=3,
        use_pre_transformer_norm=True,
        class_token=True,
    ),  # fmt: skip
    "beit (own bias)": lambda: beit(use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1),
    "beit (shared bias)": lambda: beit(use_shared_rel_pos_bias=True, global_pool="token"),
    "beit (both biases)": lambda: beit(use_rel_pos_bias=True, use_shared_rel_pos_bias=True, qkv_bias=False),
    "beit (no bias)": lambda: beit(),
    "relpos mlp": lambda: relpos(),
    "relpos table": lambda: relpos(rel_pos_type="bias", class_token=True, global_pool="token"),
    "relpos shared": lambda: relpos(shared_rel_pos=True),
    "relpos post norm": lambda: relpos(block_fn=block_of("ResPostRelPosBlock"), qk_norm=True),
    "naflex": lambda: naflex(global_pool="avg", class_token=False),
    "naflex map": lambda: naflex(global_pool="map", reg_tokens=1, class_token=False),
    "naflex rope": lambda: naflex(rope_type="axial", pos_embed="none", global_pool="token", class_token=True),
    "naflex rope mixed": lambda: naflex(rope_type="mixed", global_pool="avg", class_token=True),
}


def _swiglu():
    from timm.layers import SwiGLUPacked

    return SwiGLUPacked


def images(batch: int = 2, size: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def encoder(kind: str, **changes) -> nn.Module:
    """Qwen3's and DeepSeek's; `kind` is the class."""
    from timm.models import deepseek_vit, qwen3_vit

    module = qwen3_vit if kind.startswith("Qwen3") else deepseek_vit
    config = SMALL | {"num_heads": 2} | changes
    return lively(getattr(module, kind)(**{name: value for name, value in config.items() if value is not None}))


@dataclass(frozen=True)
class Watched(ZeroTPrune):
    """Notes what it is asked: queries, keys and the view of each layer."""

    reduce: str = "drop"
    placement: str = "after_block"
    seen: list = field(default_factory=list, compare=False)

    def choose(self, q, k, keep, view):
        choice = super().choose(q, k, keep, view)
        self.seen.append((q, k, view, choice))
        return choice


class AttentionCalls(TorchFunctionMode):
    """Notes what the fused attention is given."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is functional.scaled_dot_product_attention:
            self.calls.append((args[0], args[1], kwargs.get("attn_mask")))
        return function(*args, **kwargs)


def traces(model: nn.Module) -> tuple:
    """Hooks and attributes of every module: what must be as before when a reduction is taken off."""
    return tuple(
        (name, len(m._forward_hooks), len(m._forward_pre_hooks), tuple(sorted(m.__dict__)))
        for name, m in model.named_modules()
    )
