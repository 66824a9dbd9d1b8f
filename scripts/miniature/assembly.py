"""Stages and pipelines put together from what earlier stages left in the output folder."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from .autoencoder import AutoencoderStage, build_autoencoder
from .data import CaptionedImages, EmojiScenes
from .denoiser import ARCHITECTURES, DenoiserStage, cache_latents
from .loop import process_state
from .text import build_text_encoder, build_tokenizer

logger = logging.getLogger("train_miniature")


def averaged_weights(folder: Path) -> Path:
    """The last averaged weights of a stage.

    Raises:
        FileNotFoundError: the stage has not been trained.
    """
    found = list(folder.glob("checkpoint-*[0-9]/ema.safetensors"))
    if not found:
        raise FileNotFoundError(f"no trained weights in {folder}; train that stage first")
    return max(found, key=lambda path: int(path.parent.name.split("-")[1]))


def load_autoencoder(output_dir: Path, decoder: bool = True) -> AutoencoderKL:
    """The trained autoencoder: with the fine-tuned decoder where there is one and `decoder` asks for it."""
    vae = build_autoencoder()
    weights = averaged_weights(output_dir / "vae")
    if decoder and any((output_dir / "decoder").glob("checkpoint-*[0-9]")):
        weights = averaged_weights(output_dir / "decoder")
    vae.load_state_dict({name.removeprefix("vae."): tensor for name, tensor in load_file(weights).items()})
    scaling = output_dir / "scaling.json"
    if scaling.is_file():
        vae.register_to_config(scaling_factor=json.loads(scaling.read_text())["scaling_factor"])
    return vae.eval()


def autoencoder_stage(
    arguments: argparse.Namespace, data: EmojiScenes | CaptionedImages, batch_size: int
) -> AutoencoderStage:
    source = data if isinstance(data, CaptionedImages) else None
    if arguments.stage == "vae":
        return AutoencoderStage(build_autoencoder(), arguments.seed, batch_size, source=source)
    vae = load_autoencoder(arguments.output_dir, decoder=False)
    # another seed of the pictures than the first stage's, and mostly scenes: this decoder draws scenes
    return AutoencoderStage(
        vae,
        arguments.seed + 1,
        batch_size,
        decoder_only=True,
        latent_noise=0.15,
        scene_share=0.75,
        source=source,
    )


def denoiser_stage(
    arguments: argparse.Namespace, data: EmojiScenes | CaptionedImages, batch_size: int
) -> DenoiserStage:
    """Builds tokenizer, text encoder and denoiser; encodes the training pictures once."""
    folder = arguments.output_dir / arguments.arch
    folder.mkdir(parents=True, exist_ok=True)
    architecture = ARCHITECTURES[arguments.arch]()
    with process_state().main_process_first():
        if not (folder / "tokenizer" / "vocab.json").is_file():
            build_tokenizer(data.captions(), folder / "tokenizer", architecture.text_length)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    vae = load_autoencoder(arguments.output_dir, decoder=False)
    pool = cache_latents(vae, tokenizer, data, folder / "pool.safetensors")
    scaling = 1.0 / pool["latents"][:4096].float().std().item()
    (arguments.output_dir / "scaling.json").write_text(json.dumps({"scaling_factor": scaling}))
    vae.register_to_config(scaling_factor=scaling)
    torch.manual_seed(arguments.seed)
    text_encoder, denoiser = build_denoiser(arguments.arch, tokenizer)
    for model in (denoiser, text_encoder, vae):
        logger.info("%s: %d parameters", type(model).__name__, sum(p.numel() for p in model.parameters()))
    return DenoiserStage(
        denoiser,
        text_encoder,
        vae,
        tokenizer,
        DDIMScheduler(**architecture.scheduler_config),
        pool,
        data.preview_captions(32),
        arguments.seed,
        batch_size,
        arguments.proportion_empty_prompts,
    )


def build_denoiser(arch: str, tokenizer: CLIPTokenizer):
    """Untrained text encoder and denoiser of an architecture."""
    architecture = ARCHITECTURES[arch]()
    text_encoder = build_text_encoder(tokenizer, architecture.text_hidden_size, architecture.text_layers)
    return text_encoder, architecture.denoiser_class(**architecture.denoiser_config)


def assemble_pipeline(output_dir: Path, arch: str, weights: Path | None = None):
    """A stock pipeline, float32, of the trained parts.

    Args:
        weights: averaged weights of the denoiser stage; the last ones by default. Every rung of the ladder works.
    """
    architecture = ARCHITECTURES[arch]()
    folder = output_dir / arch
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text_encoder, denoiser = build_denoiser(arch, tokenizer)
    tensors = load_file(weights or averaged_weights(folder))
    for prefix, model in (("denoiser.", denoiser), ("text_encoder.", text_encoder)):
        model.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        model.eval()
    pipeline_class = getattr(diffusers, architecture.pipeline_class)
    return pipeline_class(
        vae=load_autoencoder(output_dir),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=denoiser,
        scheduler=DDIMScheduler(**architecture.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
