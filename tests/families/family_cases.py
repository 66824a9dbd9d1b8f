"""The table of families: real host classes at tiny sizes, with inputs that are higher than wide or the reverse (a DiT
makes squares only).

Every law is one parametrised test over `FAMILY_CASES`, so that a new family is one row and meets every law at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from genprune.cutting import plan_base
from genprune.families import family_of, find_sites
from genprune.plan import PruningPlan
from genprune.sites import Sites


@dataclass(frozen=True)
class FamilyCase:
    """One row: how to build the dense model, the input's size, and the kinds of site that it must have."""

    name: str
    build: Callable[[], nn.Module]
    height: int
    width: int
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class DenseRun:
    """A dense model in evaluation mode, one batch of two rows and its output. Shared by tests: never changed."""

    case: FamilyCase
    model: nn.Module
    sites: Sites
    inputs: dict[str, Any]
    output: Tensor

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def plan(self, keep: dict[str, Tensor]) -> PruningPlan:
        return PruningPlan(plan_base(self.model), keep)


def randomise_(model: nn.Module) -> nn.Module:
    """Fill biases, norms, LayerScales and zero-initialised projections, so that no error hides at zero or one."""
    source = torch.Generator().manual_seed(7)

    def normal(parameter: Tensor) -> Tensor:
        return torch.randn(parameter.shape, generator=source)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".gamma"):  # LayerScale
                parameter.copy_(1 + 0.1 * normal(parameter))
            elif parameter.ndim <= 1:
                parameter.add_(0.2 * normal(parameter))
            elif parameter.std() < 0.05:
                parameter.copy_(normal(parameter) * parameter[0].numel() ** -0.5)
    return model.eval()


def example_inputs(model: nn.Module, case: FamilyCase, batch: int = 2) -> dict[str, Any]:
    family = family_of(model)
    text = {} if family.library == "timm" else {"text_length": 5}
    point = family.operating_point(model, height=case.height, width=case.width, batch=batch, **text)
    torch.manual_seed(3)
    return family.example_inputs(model, point, "cpu", torch.float32)


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The output tensor of one forward call."""
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output.sample


@cache
def dense_run(name: str) -> DenseRun:
    """The dense run of a case, built once a session."""
    case = next(case for case in FAMILY_CASES if case.name == name)
    torch.manual_seed(0)
    model = randomise_(case.build())
    inputs = example_inputs(model, case)
    with torch.no_grad():
        output = run(model, inputs)
    return DenseRun(case, model, find_sites(model), inputs, output)


def random_keep(sites: Sites, seed: int, share: float = 0.6) -> dict[str, Tensor]:
    """Masks that keep about `share` of every site's units, at random; at least one site loses something."""
    source = torch.Generator().manual_seed(seed)
    keep = {name: torch.rand(site.size, generator=source) < share for name, site in sites.items()}
    if all(mask.all() for mask in keep.values()):
        next(iter(keep.values()))[0] = False
    return keep


def removed_keep(sites: Sites) -> dict[str, Tensor]:
    """Masks that keep nothing."""
    return {name: torch.zeros(site.size, dtype=torch.bool) for name, site in sites.items()}


def difference(left: Tensor, right: Tensor) -> float:
    """Relative difference of two tensors (2-norm, over that of the left one)."""
    return float((left - right).norm() / left.norm().clamp_min(1e-12))


# ---- U-Nets ---------------------------------------------------------------------------------------------------------


def unet(**changes: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 12,
        "attention_head_dim": 4,  # diffusers: the number of heads
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(config | changes))


def sdxl_unet() -> nn.Module:
    return unet(
        attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
    )


def unconditional_unet() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=8,
    )


# ---- MMDiTs ---------------------------------------------------------------------------------------------------------


def flux(guidance: bool) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=guidance,
        axes_dims_rope=(2, 2, 4),
    )


def sd3(**changes: Any) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 12,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 10,
        "pos_embed_max_size": 8,
    }
    return SD3Transformer2DModel(**(config | changes))


# ---- DiTs -----------------------------------------------------------------------------------------------------------


def dit(**changes: Any) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "num_embeds_ada_norm": 10,
    }
    return DiTTransformer2DModel(**(config | changes))


def pixart(**changes: Any) -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "attention_head_dim": 6,
        "num_attention_heads": 4,
        "cross_attention_dim": 24,
        "caption_channels": 12,
    }
    return PixArtTransformer2DModel(**(config | changes))


# ---- ViTs -----------------------------------------------------------------------------------------------------------


def vit(name: str = "vit_tiny_patch16_224", **changes: Any) -> nn.Module:
    import timm

    config = {
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 4,
        "img_size": (16, 24),
        "patch_size": 4,
        "num_classes": 10,
    }
    return timm.create_model(name, **(config | changes))


def vit_packed_glu() -> nn.Module:
    from timm.layers import SwiGLUPacked

    return vit(init_values=1e-5, reg_tokens=2, mlp_layer=SwiGLUPacked, qk_norm=True)


def vit_split_glu() -> nn.Module:
    from timm.layers import SwiGLU

    return vit("deit_tiny_distilled_patch16_224", mlp_layer=SwiGLU, proj_bias=False)


def vit_post_norm() -> nn.Module:
    from timm.models.vision_transformer import ResPostBlock

    return vit(block_fn=ResPostBlock)


def vit_rope_gated() -> nn.Module:
    from functools import partial

    from timm.layers import AttentionRope

    return vit(attn_layer=partial_class(AttentionRope, partial(dict, qkv_fused=False, gated=True)()))


def partial_class(layer: type[nn.Module], fixed: dict[str, Any]) -> type[nn.Module]:
    """A subclass with some constructor arguments fixed: timm's VisionTransformer asks for a class."""

    class Fixed(layer):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **(kwargs | fixed))

    Fixed.__name__ = layer.__name__
    return Fixed


_UNET = ("heads", "neurons", "channels", "branch", "block", "wrapper")
_MMDIT = ("heads", "neurons", "modulation", "branch", "block")
_PIXART = ("heads", "neurons", "branch", "block")
_VIT = ("heads", "neurons", "branch", "block")

FAMILY_CASES = (
    FamilyCase("unet", unet, 8, 12, _UNET),
    FamilyCase("unet-sdxl", sdxl_unet, 12, 8, _UNET),
    FamilyCase("unet-scale-shift", lambda: unet(resnet_time_scale_shift="scale_shift"), 8, 12, _UNET),
    FamilyCase("unet-unconditional", unconditional_unet, 8, 12, ("heads", "channels", "branch", "wrapper")),
    FamilyCase("flux", lambda: flux(False), 8, 12, _MMDIT),
    FamilyCase("flux-guidance", lambda: flux(True), 12, 8, _MMDIT),
    FamilyCase("sd3", sd3, 8, 12, _MMDIT),
    FamilyCase("sd3-dual", lambda: sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm"), 12, 8, _MMDIT),
    FamilyCase("dit", dit, 8, 8, _MMDIT),
    FamilyCase("dit-geglu", lambda: dit(activation_fn="geglu", norm_elementwise_affine=True), 12, 12, _MMDIT),
    FamilyCase("pixart", pixart, 8, 12, _PIXART),
    FamilyCase("pixart-size-conditions", lambda: pixart(use_additional_conditions=True), 12, 8, _PIXART),
    FamilyCase("vit", vit, 16, 24, _VIT),
    FamilyCase("vit-packed-glu-registers", vit_packed_glu, 16, 24, _VIT),
    FamilyCase("vit-distilled-split-glu", vit_split_glu, 16, 24, _VIT),
    FamilyCase("vit-post-norm", vit_post_norm, 16, 24, _VIT),
    FamilyCase("vit-rope-gated", vit_rope_gated, 16, 24, _VIT),
)
CASE_NAMES = tuple(case.name for case in FAMILY_CASES)
