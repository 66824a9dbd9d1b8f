"""Stock diffusers pipelines with tiny random weights, built offline."""

from __future__ import annotations

import json

import torch
from tiny_hosts import dit, flux, pixart, sd3, sd_unet


def clip_tokenizer(folder):
    """A CLIP tokenizer over letters."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def clip_text(width: int, projection: int | None = None):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=projection or width,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5(width: int):
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(2)
    config = T5Config(vocab_size=64, d_model=width, d_kv=4, d_ff=2 * width, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def vae(latent_channels: int = 4):
    from diffusers import AutoencoderKL

    torch.manual_seed(3)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


def sd_pipeline(folder, scheduler=None):
    """Stable Diffusion: 16 px images, 8 x 8 latents, prompts of letters."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    default = DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, steps_offset=1, clip_sample=False
    )
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip_text(24),
        tokenizer=clip_tokenizer(folder),
        unet=sd_unet().eval(),
        scheduler=scheduler or default,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def ddpm_pipeline():
    """Unconditional, in pixel space."""
    from diffusers import DDPMPipeline, DDPMScheduler
    from tiny_hosts import ddpm_unet

    return DDPMPipeline(ddpm_unet().eval(), DDPMScheduler(num_train_timesteps=100))


def flux_pipeline(folder):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(4),
        text_encoder=clip_text(16),
        tokenizer=clip_tokenizer(folder),
        text_encoder_2=t5(16),
        tokenizer_2=clip_tokenizer(folder),
        transformer=flux().eval(),
    )


def sd3_pipeline(folder):
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(
        transformer=sd3().eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(4),
        text_encoder=clip_text(8, 8),
        tokenizer=clip_tokenizer(folder),
        text_encoder_2=clip_text(8, 8),
        tokenizer_2=clip_tokenizer(folder),
        text_encoder_3=t5(16),
        tokenizer_3=clip_tokenizer(folder),
    )


def dit_pipeline(folder=None):
    """Class-conditional: takes no prompts."""
    from diffusers import DDIMScheduler, DiTPipeline

    return DiTPipeline(dit().eval(), vae(), DDIMScheduler(), id2label={0: "tench, Tinca tinca", 1: "goldfish"})


def pixart_alpha_pipeline(folder):
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline

    model = pixart(sample_size=128).eval()  # the size at which the pipeline gives the image's size as a condition
    return PixArtAlphaPipeline(clip_tokenizer(folder), t5(16), vae(), model, DPMSolverMultistepScheduler())


def pixart_sigma_pipeline(folder):
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

    return PixArtSigmaPipeline(clip_tokenizer(folder), t5(16), vae(), pixart().eval(), DPMSolverMultistepScheduler())
