"""Stage "vae": a small `AutoencoderKL`, 64 px pictures to 16x16x4 latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from genprune.miniature import grammar

from .data import CaptionedImages
from .pictures import contact_sheet, to_tensor


def build_autoencoder(block_out_channels: tuple[int, ...] = (24, 48, 96)) -> AutoencoderKL:
    """An untrained autoencoder; its first level stays narrow, because 64x64 is where the time goes."""
    count = len(block_out_channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=block_out_channels,
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
        sample_size=grammar.SIDE,
        scaling_factor=1.0,
    )


def crowded_picture(rng: np.random.Generator) -> np.ndarray:
    """A picture that teaches the autoencoder more per pixel than a scene: 2 to 6 sprites of any size, any background.

    Sprites of the held-out concepts occur too, so that the autoencoder is not tied to the captioned ones.
    """
    words = (*grammar.CONCEPTS, *grammar.HELD_OUT_CONCEPTS)
    names = list(grammar.COLORS)
    color = np.array(grammar.COLORS[names[rng.integers(len(names))]]) + rng.integers(-12, 13, 3)
    canvas = grammar.background(color, grammar.TEXTURES[rng.integers(2)])
    for _ in range(rng.integers(2, 7)):
        box = int(rng.integers(20, 46))
        x, y = rng.uniform(4, grammar.SIDE - 4, 2)
        grammar.paste(canvas, words[rng.integers(len(words))], x, y, box)
    return canvas


def detail_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """L1 plus L1 of horizontal and vertical differences at three scales: plain L1 alone gives soft edges.

    Both arguments have shape `(B, 3, H, W)` and range [-1, 1]; the result is a scalar.
    """
    total = predicted.new_zeros(())
    for scale in range(3):
        error = predicted - target
        total = total + error.abs().mean()
        total = total + (error[..., 1:] - error[..., :-1]).abs().mean()
        total = total + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
        if scale < 2:
            predicted, target = functional.avg_pool2d(predicted, 2), functional.avg_pool2d(target, 2)
    return total


class AutoencoderStage:
    """Trains encoder and decoder, or the decoder alone once a denoiser depends on the latents.

    Args:
        vae: the autoencoder, trained in place.
        seed: of the pictures.
        batch_size: pictures a step.
        decoder_only: freeze the encoder, and add noise of `latent_noise` standard deviations to the latents, since a
            denoiser's latents are never perfect.
        scene_share: share of grammar scenes in a batch; the rest are `crowded_picture`s.
        kl_weight: of the KL term, a mean over latent elements.
        source: pictures to train on in place of the emoji scenes.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        seed: int = 0,
        batch_size: int = 16,
        decoder_only: bool = False,
        latent_noise: float = 0.0,
        scene_share: float = 0.4,
        kl_weight: float = 2e-4,
        source: CaptionedImages | None = None,
    ) -> None:
        self.modules = nn.ModuleDict({"vae": vae}).to(memory_format=torch.channels_last)
        vae.encoder.requires_grad_(not decoder_only)
        vae.quant_conv.requires_grad_(not decoder_only)
        self.vae, self.seed, self.batch_size, self.decoder_only = vae, seed, batch_size, decoder_only
        self.latent_noise, self.kl_weight = latent_noise, kl_weight
        self.scene_count = round(batch_size * scene_share)
        self.source = source

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Tensor:
        """This process's pictures of batch number `step`: float, shape `(B, 3, 64, 64)`, range [-1, 1]."""
        rng = np.random.default_rng((self.seed, 17, step, rank))
        count, scene_count = self.batch_size // world, self.scene_count // world
        if self.source is not None:
            pictures = [self.source.picture(row) for row in rng.integers(self.source.count, size=count)]
        else:
            pictures = [grammar.render(grammar.sample_scene(rng)) for _ in range(scene_count)]
            pictures += [crowded_picture(rng) for _ in range(count - scene_count)]
        return to_tensor(np.stack(pictures)).to(next(self.vae.parameters()).device)

    def loss(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, dict[str, float]]:
        pictures = self.batch(step, rank, world)
        with torch.set_grad_enabled(not self.decoder_only):
            mean, log_variance = self.vae.quant_conv(self.vae.encoder(pictures)).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        if self.decoder_only:
            level = self.latent_noise * mean.std() * torch.rand(len(mean), 1, 1, 1, device=mean.device)
            latents = mean + level * torch.randn_like(mean)
        decoded = self.vae.decoder(self.vae.post_quant_conv(latents)).float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        detail = detail_loss(decoded, pictures)
        mse = functional.mse_loss(decoded.detach(), pictures).item()
        loss = detail if self.decoder_only else detail + self.kl_weight * kl
        return loss, {"detail": detail.item(), "mse": mse, "kl": kl.item(), "latent_std": mean.std().item()}

    @torch.no_grad()
    def preview(self, folder: Path, step: int) -> None:
        if self.source is not None:
            pictures = np.stack([self.source.picture(row) for row in range(min(16, self.source.count))])
        else:
            pictures = np.stack([grammar.render(scene) for scene in grammar.scenes("dev", 16, seed=self.seed)])
        target = to_tensor(pictures).to(next(self.vae.parameters()).device)
        decoded = self.vae.decode(self.vae.encode(target).latent_dist.mode()).sample
        both = torch.cat([target[:8], decoded[:8], target[8:], decoded[8:]])
        contact_sheet(both, folder / f"preview-{step:06d}.png", columns=8, zoom=3)
        (folder / "preview.txt").write_text(f"step {step} dev mse {functional.mse_loss(decoded, target).item():.5f}\n")
