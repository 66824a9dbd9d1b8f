"""Real host classes at tiny sizes, one builder for each family, for the tests of costs and planning."""

from __future__ import annotations

import torch
from torch import nn


def sd_unet(**changes) -> nn.Module:
    """An SD-1.x-shaped U-Net: convolutional projections, GEGLU, three attention resolutions less."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(config | changes))


def sdxl_unet() -> nn.Module:
    """An SDXL-shaped U-Net: linear projections, several blocks a wrapper, pooled text and sizes as conditions."""
    return sd_unet(
        attention_head_dim=(4, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )


def ddpm_unet() -> nn.Module:
    """An unconditional U-Net with attention that holds its own residual."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
    )


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=False,
    )


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=16,
        caption_projection_dim=24,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )


def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=8, num_layers=3, attention_head_dim=8, num_attention_heads=3
    )


def pixart(**changes) -> nn.Module:
    """Shaped like PixArt-Sigma; `sample_size=128` makes it PixArt-Alpha's 1024 px model."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 3,
        "cross_attention_dim": 24,
        "caption_channels": 16,
    }
    return PixArtTransformer2DModel(**(config | changes))


def vit() -> nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5
    )


HOSTS = {
    "sd": sd_unet,
    "sdxl": sdxl_unet,
    "ddpm": ddpm_unet,
    "flux": flux,
    "sd3": sd3,
    "dit": dit,
    "pixart": pixart,
    "vit": vit,
}
