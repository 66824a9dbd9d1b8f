"""Stage "denoiser": the denoiser and its text encoder, trained together on latents of the frozen autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import CLIPTokenizer

from .data import CaptionedImages, EmojiScenes, shuffled_rows
from .loop import process_state
from .pictures import contact_sheet, to_tensor
from .text import tokenize


@dataclass(frozen=True)
class Architecture:
    """One kind of denoiser: how it is built, its scheduler in training and sampling, the pipeline that holds it."""

    denoiser_class: type
    denoiser_config: dict
    scheduler_config: dict
    pipeline_class: str
    text_hidden_size: int = 128
    text_layers: int = 2
    text_length: int = 16


def unet_architecture(
    block_out_channels: tuple[int, ...] = (48, 96, 128),
    transformer_layers: tuple[int, ...] = (1, 1, 3),
    text_hidden_size: int = 128,
    norm_num_groups: int = 16,
) -> Architecture:
    """Stable-Diffusion-shaped, with SDXL's proportions: no attention at the first level, several transformer blocks
    a stage below, heads of 32 channels, GEGLU, linear projections."""
    levels = len(block_out_channels) - 1
    return Architecture(
        denoiser_class=UNet2DConditionModel,
        denoiser_config={
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": block_out_channels,
            "norm_num_groups": norm_num_groups,
            "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * levels,
            "up_block_types": ("CrossAttnUpBlock2D",) * levels + ("UpBlock2D",),
            "transformer_layers_per_block": transformer_layers,
            # in this class `attention_head_dim` is, by a historical accident, the number of heads
            "attention_head_dim": tuple(max(1, channels // 32) for channels in block_out_channels),
            "cross_attention_dim": text_hidden_size,
            "use_linear_projection": True,
        },
        # zero terminal SNR: with an ordinary schedule the last timestep leaks the mean colour, and the model then
        # learns neither background nor layout in a short training
        scheduler_config={
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "clip_sample": False,
            "set_alpha_to_one": True,
            "steps_offset": 1,
        },
        pipeline_class="StableDiffusionPipeline",
        text_hidden_size=text_hidden_size,
    )


def half_width_unet_architecture() -> Architecture:
    """The same at half the width, text included: were it no worse, the task would be too easy to judge pruning by."""
    return unet_architecture((24, 48, 64), text_hidden_size=64, norm_num_groups=8)


@torch.no_grad()
def cache_latents(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    data: EmojiScenes | CaptionedImages,
    path: Path,
    batch_size: int = 128,
) -> dict[str, Tensor]:
    """Latents and token ids of all pictures of `data`, from `path` where it exists, else computed and written there.

    Returns:
        `latents`, float16 `(N, 4, 16, 16)`, unscaled; `tokens`, int64 `(N, length)`.
    """
    if path.is_file():
        return load_file(path)
    state = process_state()
    rank, world = state.process_index, state.num_processes
    device = next(vae.parameters()).device
    vae = vae.to(memory_format=torch.channels_last).eval()
    batches = data.pictures(batch_size, rank, world)
    count = -(-data.count // batch_size)
    part = {}
    for number, batch in enumerate(
        tqdm(batches, total=count // world, desc="latents", mininterval=5, disable=rank > 0)
    ):
        with torch.autocast(device.type, torch.bfloat16):
            mean = vae.encode(to_tensor(batch).to(device)).latent_dist.mode()
        part[str(number * world + rank)] = mean.half().contiguous().cpu()
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_suffix(f".part-{number}-of-{world}") for number in range(world)]
    save_file(part, files[rank])
    state.wait_for_everyone()
    parts = {name: tensor for file in files for name, tensor in load_file(file).items()}
    latents = torch.cat([parts[str(number)] for number in range(count)])
    tensors = {"latents": latents, "tokens": tokenize(tokenizer, data.captions()).contiguous()}
    state.wait_for_everyone()
    if state.is_main_process:
        save_file(tensors, path)
        for file in files:
            file.unlink()
    state.wait_for_everyone()
    return tensors


class DenoiserStage:
    """v-prediction with classifier-free guidance dropout.

    Args:
        denoiser, text_encoder: trained in place, together.
        vae: frozen, decodes previews; its `config.scaling_factor` scales the latents.
        tokenizer: for the empty prompt and previews.
        scheduler: gives the noise levels.
        pool: `cache_latents`'s result.
        preview_captions: drawn after every `preview_steps`.
        proportion_empty_prompts: share of captions replaced by the empty one.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        text_encoder: nn.Module,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        scheduler: DDIMScheduler,
        pool: dict[str, Tensor],
        preview_captions: list[str],
        seed: int = 0,
        batch_size: int = 48,
        proportion_empty_prompts: float = 0.1,
    ) -> None:
        self.modules = nn.ModuleDict({"denoiser": denoiser, "text_encoder": text_encoder})
        self.modules.to(memory_format=torch.channels_last)
        self.denoiser, self.text_encoder, self.vae, self.tokenizer = denoiser, text_encoder, vae, tokenizer
        self.scheduler, self.pool, self.preview_captions = scheduler, pool, preview_captions
        self.seed, self.batch_size, self.proportion_empty_prompts = seed, batch_size, proportion_empty_prompts
        self.empty = tokenize(tokenizer, [""])
        self.alphas = scheduler.alphas_cumprod

    def loss(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, dict[str, float]]:
        device = next(self.denoiser.parameters()).device
        rows = shuffled_rows(step, self.batch_size, len(self.pool["latents"]), self.seed)[rank::world]
        count = len(rows)
        latents = self.pool["latents"][rows].float().to(device) * self.vae.config.scaling_factor
        tokens = self.pool["tokens"][rows]
        tokens = torch.where(torch.rand(count, 1) < self.proportion_empty_prompts, self.empty, tokens).to(device)
        # stratified: one timestep from each of B equal intervals, which lowers the variance of the loss
        total = self.scheduler.config.num_train_timesteps
        timesteps = ((torch.arange(count) + torch.rand(count)) / count * total).long().clamp(max=total - 1)
        alphas = self.alphas[timesteps].view(-1, 1, 1, 1).to(device)
        timesteps = timesteps.to(device)
        noise = torch.randn(latents.shape).to(device)
        noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
        target = alphas.sqrt() * noise - (1 - alphas).sqrt() * latents
        states = self.text_encoder(tokens)[0]
        predicted = self.denoiser(noisy.contiguous(memory_format=torch.channels_last), timesteps, states).sample
        return functional.mse_loss(predicted.float(), target), {}

    @torch.no_grad()
    def preview(self, folder: Path, step: int) -> None:
        captions = self.preview_captions
        latents = draw_latents(self.denoiser, self.text_encoder, self.tokenizer, self.scheduler, captions)
        contact_sheet(
            decode(self.vae, latents), folder / f"preview-{step:06d}.png", columns=8, zoom=2, captions=captions
        )


@torch.no_grad()
def draw_latents(
    denoiser,
    text_encoder,
    tokenizer,
    scheduler,
    captions: list[str],
    seed: int = 0,
    steps: int = 20,
    guidance_scale: float = 3.5,
) -> Tensor:
    """Scaled latents of captions, float `(B, 4, 16, 16)`: the stock pipeline's loop without its overhead.

    The noise of caption i is seeded by `seed + i`, so a picture does not depend on its batch.
    """
    device = next(denoiser.parameters()).device
    side, channels = denoiser.config.sample_size, denoiser.config.in_channels
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(captions))]
    latents = torch.stack([torch.randn(channels, side, side, generator=g) for g in generators]).to(device)
    states = text_encoder(tokenize(tokenizer, [""] * len(captions) + captions).to(device))[0]
    scheduler = DDIMScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        both = torch.cat([latents, latents]).contiguous(memory_format=torch.channels_last)
        plain, conditional = denoiser(both, timestep, states).sample.float().chunk(2)
        predicted = plain + guidance_scale * (conditional - plain)
        latents = scheduler.step(predicted, timestep, latents).prev_sample
    return latents


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pictures of scaled latents, float `(B, 3, H, W)`, about [-1, 1]."""
    return torch.cat([vae.decode(part / vae.config.scaling_factor).sample.float() for part in latents.split(128)])
