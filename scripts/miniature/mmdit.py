"""Miniature B's denoiser: FLUX-shaped, with double and single blocks, trained by rectified flow."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from .data import shuffled_rows
from .denoiser import Architecture, decode
from .pictures import contact_sheet
from .text import tokenize

SCHEDULER = {"num_train_timesteps": 1000, "shift": 1.0}


def mmdit_architecture(width: int = 128, double_blocks: int = 3, single_blocks: int = 6) -> Architecture:
    """Heads of 16 channels, rotary embeddings, no embedded guidance: it is guided as `true_cfg_scale` does."""
    return Architecture(
        denoiser_class=FluxTransformer2DModel,
        denoiser_config={
            "patch_size": 1,
            "in_channels": 16,  # 4 latent channels, packed 2x2
            "num_layers": double_blocks,
            "num_single_layers": single_blocks,
            "attention_head_dim": 16,
            "num_attention_heads": width // 16,
            "joint_attention_dim": 128,
            "pooled_projection_dim": 128,
            "guidance_embeds": False,
            "axes_dims_rope": (4, 6, 6),
        },
        scheduler_config=SCHEDULER,
        pipeline_class="FluxPipeline",
    )


def half_width_mmdit_architecture() -> Architecture:
    """The same blocks at half the width; the text encoders stay."""
    return mmdit_architecture(width=64)


def build_t5_tokenizer(corpus: list[str], folder: Path, max_length: int) -> T5TokenizerFast:
    """A stock T5 tokenizer in which every word of `corpus` is one piece, and other words fall apart into letters."""
    words = sorted({word for text in corpus for word in text.lower().replace(",", " ").split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (",", -3.0), ("▁", -10.0)]
    pieces += [("▁" + word, -3.0) for word in words]
    pieces += [(letter, -12.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789.-'"]
    T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=max_length).save_pretrained(folder)
    return T5TokenizerFast.from_pretrained(folder)


def build_t5(tokenizer: T5TokenizerFast, width: int = 128, layers: int = 2) -> T5EncoderModel:
    """An untrained T5 encoder for this vocabulary."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=32,
            d_ff=2 * width,
            num_layers=layers,
            num_heads=width // 32,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


@torch.no_grad()
def start_at_identity(transformer: FluxTransformer2DModel) -> None:
    """AdaLN-zero and a zero output, in place: every block starts as the identity (DiT, arXiv 2212.09748, sec. 3.2)."""
    for name, module in transformer.named_modules():
        parts = name.split(".")
        modulation = parts[-1] == "linear" and parts[-2].startswith("norm")
        if modulation or name == "proj_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def pack(latents: Tensor) -> Tensor:
    """`(B, C, h, w)` to the tokens `(B, h*w/4, C*4)` that Flux takes."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def unpack(tokens: Tensor, side: int = 16) -> Tensor:
    """Tokens `(B, side*side/4, C*4)` back to latents `(B, C, side, side)`."""
    rows, _, channels = tokens.shape
    grid = tokens.view(rows, side // 2, side // 2, channels // 4, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(rows, channels // 4, side, side)


class TextConditions:
    """What a FLUX-shaped denoiser is told: T5 states of a caption, CLIP's pooled output, position ids."""

    def __init__(self, text_encoder: nn.Module, text_encoder_2: nn.Module, side: int = 16) -> None:
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2
        self.image_ids = FluxPipeline._prepare_latent_image_ids(1, side // 2, side // 2, "cpu", torch.float32)

    def __call__(self, tokens: Tensor, tokens_2: Tensor) -> dict[str, Tensor]:
        """Keyword arguments of the denoiser for token ids `(B, L)` of both tokenizers."""
        device = next(self.text_encoder.parameters()).device
        states = self.text_encoder_2(tokens_2.to(device))[0]
        return {
            "encoder_hidden_states": states,
            "pooled_projections": self.text_encoder(tokens.to(device)).pooler_output,
            "txt_ids": torch.zeros(states.shape[1], 3, device=device),
            "img_ids": self.image_ids.to(device),
        }


class FlowStage:
    """Rectified flow: predict `noise - clean` at `(1 - t) clean + t noise`, with guidance dropout.

    Args:
        denoiser, text_encoder, text_encoder_2: trained in place, together.
        vae: frozen, decodes previews; its `config.scaling_factor` scales the latents.
        tokenizer, tokenizer_2: for the empty prompt and previews.
        pool: `latents`, and token ids `tokens` and `tokens_2`.

    Reference:
        Timesteps: logit-normal(0, 1), Esser et al. (SD3, arXiv 2403.03206), sec. 3.1.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        vae: nn.Module,
        tokenizers: dict[str, CLIPTokenizer | T5TokenizerFast],
        pool: dict[str, Tensor],
        preview_captions: list[str],
        seed: int = 0,
        batch_size: int = 64,
        proportion_empty_prompts: float = 0.1,
    ) -> None:
        self.modules = nn.ModuleDict(modules)
        self.denoiser, self.vae, self.tokenizers = modules["denoiser"], vae, tokenizers
        self.conditions = TextConditions(modules["text_encoder"], modules["text_encoder_2"])
        self.pool, self.preview_captions = pool, preview_captions
        self.seed, self.batch_size, self.proportion_empty_prompts = seed, batch_size, proportion_empty_prompts
        self.empty = {name: tokenize(tokenizer, [""]) for name, tokenizer in tokenizers.items()}

    def loss(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, dict[str, float]]:
        device = next(self.denoiser.parameters()).device
        rows = shuffled_rows(step, self.batch_size, len(self.pool["latents"]), self.seed)[rank::world]
        count = len(rows)
        clean = pack(self.pool["latents"][rows].float().to(device) * self.vae.config.scaling_factor)
        dropped = torch.rand(count, 1) < self.proportion_empty_prompts
        tokens = torch.where(dropped, self.empty["tokenizer"], self.pool["tokens"][rows])
        tokens_2 = torch.where(dropped, self.empty["tokenizer_2"], self.pool["tokens_2"][rows])
        # stratified: one quantile from each of B equal intervals, which lowers the variance of the loss
        quantiles = (torch.arange(count) + torch.rand(count)) / count
        times = torch.sigmoid(torch.special.ndtri(quantiles.clamp(1e-4, 1 - 1e-4))).to(device)  # (B,)
        noise = torch.randn(clean.shape).to(device)
        mixed = times.view(-1, 1, 1)
        noisy = (1 - mixed) * clean + mixed * noise
        conditions = self.conditions(tokens, tokens_2)
        predicted = self.denoiser(hidden_states=noisy, timestep=times, return_dict=False, **conditions)[0]
        return functional.mse_loss(predicted.float(), noise - clean), {}

    @torch.no_grad()
    def preview(self, folder: Path, step: int) -> None:
        captions = self.preview_captions
        latents = draw_flow_latents(self.denoiser, self.conditions, self.tokenizers, captions)
        contact_sheet(
            decode(self.vae, latents), folder / f"preview-{step:06d}.png", columns=8, zoom=2, captions=captions
        )


@torch.no_grad()
def draw_flow_latents(
    denoiser: nn.Module,
    conditions: TextConditions,
    tokenizers: dict[str, CLIPTokenizer | T5TokenizerFast],
    captions: list[str],
    seed: int = 0,
    steps: int = 20,
    guidance_scale: float = 3.5,
) -> Tensor:
    """Scaled latents of captions, float `(B, 4, 16, 16)`; the noise of caption i is seeded by `seed + i`."""
    device = next(denoiser.parameters()).device
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(captions))]
    # the stock pipeline draws noise unpacked and packs it
    latents = pack(torch.stack([torch.randn(4, 16, 16, generator=g) for g in generators])).to(device)
    texts = [""] * len(captions) + captions if guidance_scale > 1 else captions
    given = conditions(*(tokenize(tokenizers[name], texts) for name in ("tokenizer", "tokenizer_2")))
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    for timestep in scheduler.timesteps:
        many = latents.repeat(len(texts) // len(captions), 1, 1)
        times = (timestep / 1000).expand(len(many)).to(device)
        predicted = denoiser(hidden_states=many, timestep=times, return_dict=False, **given)[0].float()
        if guidance_scale > 1:
            plain, conditional = predicted.chunk(2)
            predicted = plain + guidance_scale * (conditional - plain)
        latents = scheduler.step(predicted, timestep, latents).prev_sample
    return unpack(latents)
