"""A complete Stable Diffusion pipeline of real host classes at tiny sizes, with random weights, built offline."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tiny_pipelines import clip_text, clip_tokenizer


def tiny_pipeline(folder: Path, seed: int = 0, channels: tuple[int, int] = (8, 16)) -> StableDiffusionPipeline:
    """16x16 latents of 4 channels, 32 px pictures; the seed decides every weight.

    The denoiser's last layer is scaled up: at its ordinary initialisation prompts and seeds hardly move the picture.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    with torch.no_grad():
        unet.conv_out.weight.mul_(4)
        vae.decoder.conv_out.weight.mul_(4)
        vae.decoder.conv_out.weight.sub_(vae.decoder.conv_out.weight.mean(dim=(1, 2, 3), keepdim=True))
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=clip_text(16),
        tokenizer=clip_tokenizer(folder),
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
