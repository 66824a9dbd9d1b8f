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
from torch import nn
from transformers import CLIPTokenizer, T5TokenizerFast

from .autoencoder import AutoencoderStage, build_autoencoder
from .data import CaptionedImages, EmojiScenes
from .denoiser import Architecture, DenoiserStage, cache_latents, half_width_unet_architecture, unet_architecture
from .distillation import DistillationStage, teacher_pairs
from .loop import process_state
from .mmdit import (
    FlowStage,
    TextConditions,
    build_t5,
    build_t5_tokenizer,
    half_width_mmdit_architecture,
    mmdit_architecture,
    start_at_identity,
)
from .text import build_text_encoder, build_tokenizer, tokenize

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


# one entry per --arch
ARCHITECTURES = {
    "unet": unet_architecture,
    "unet_half": half_width_unet_architecture,
    "mmdit": mmdit_architecture,
    "mmdit_half": half_width_mmdit_architecture,
}


def denoiser_stage(
    arguments: argparse.Namespace, data: EmojiScenes | CaptionedImages, batch_size: int
) -> DenoiserStage | FlowStage:
    """Builds tokenizers, text encoders and denoiser; encodes the training pictures once."""
    folder = arguments.output_dir / arguments.arch
    folder.mkdir(parents=True, exist_ok=True)
    architecture = ARCHITECTURES[arguments.arch]()
    captions = data.captions()
    with process_state().main_process_first():
        if not (folder / "tokenizer" / "vocab.json").is_file():
            build_tokenizer(captions, folder / "tokenizer", architecture.text_length)
            if is_flow(architecture):
                build_t5_tokenizer(captions, folder / "tokenizer_2", architecture.text_length)
    tokenizers = load_tokenizers(folder, architecture)
    vae = load_autoencoder(arguments.output_dir, decoder=False)
    pool = cache_latents(vae, tokenizers["tokenizer"], data, folder / "pool.safetensors")
    scaling = 1.0 / pool["latents"][:4096].float().std().item()
    (arguments.output_dir / "scaling.json").write_text(json.dumps({"scaling_factor": scaling}))
    vae.register_to_config(scaling_factor=scaling)
    torch.manual_seed(arguments.seed)
    modules = build_denoiser(architecture, tokenizers)
    for name, model in {**modules, "vae": vae}.items():
        logger.info("%s: %d parameters", name, sum(p.numel() for p in model.parameters()))
    common = (data.preview_captions(32), arguments.seed, batch_size, arguments.proportion_empty_prompts)
    if is_flow(architecture):
        pool["tokens_2"] = tokenize(tokenizers["tokenizer_2"], captions)
        return FlowStage(modules, vae, tokenizers, pool, *common)
    return DenoiserStage(
        modules["denoiser"],
        modules["text_encoder"],
        vae,
        tokenizers["tokenizer"],
        DDIMScheduler(**architecture.scheduler_config),
        pool,
        *common,
    )


def distillation_stage(arguments: argparse.Namespace, data: EmojiScenes, batch_size: int) -> DistillationStage:
    """The trained denoiser as teacher and as the student's start; draws the teacher's pictures once."""
    teacher = assemble_pipeline(arguments.output_dir, arguments.arch)
    tokenizers = {"tokenizer": teacher.tokenizer, "tokenizer_2": teacher.tokenizer_2}
    conditions = TextConditions(
        teacher.text_encoder.requires_grad_(False), teacher.text_encoder_2.requires_grad_(False)
    )
    folder = arguments.output_dir / f"{arguments.arch}_4_step"
    folder.mkdir(parents=True, exist_ok=True)
    captions = data.captions()
    latents = teacher_pairs(teacher.transformer, conditions, tokenizers, captions, folder / "pairs.safetensors")
    return DistillationStage(
        teacher.transformer, conditions, tokenizers, teacher.vae, captions, latents, arguments.seed, batch_size
    )


def is_flow(architecture: Architecture) -> bool:
    """Whether it is FLUX-shaped: two text encoders, rectified flow."""
    return architecture.pipeline_class == "FluxPipeline"


def load_tokenizers(folder: Path, architecture: Architecture) -> dict[str, CLIPTokenizer | T5TokenizerFast]:
    """The tokenizers by the names of the pipeline's components."""
    tokenizers = {"tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer")}
    if is_flow(architecture):
        tokenizers["tokenizer_2"] = T5TokenizerFast.from_pretrained(folder / "tokenizer_2")
    return tokenizers


def build_denoiser(architecture: Architecture, tokenizers: dict) -> dict[str, nn.Module]:
    """Untrained text encoders and denoiser, by name."""
    modules: dict[str, nn.Module] = {
        "text_encoder": build_text_encoder(
            tokenizers["tokenizer"], architecture.text_hidden_size, architecture.text_layers
        )
    }
    if is_flow(architecture):
        modules["text_encoder_2"] = build_t5(tokenizers["tokenizer_2"], architecture.text_hidden_size)
    modules["denoiser"] = architecture.denoiser_class(**architecture.denoiser_config)
    if is_flow(architecture):
        start_at_identity(modules["denoiser"])
    return modules


def distilled_weights(output_dir: Path, arch: str) -> Path:
    """Averaged weights of the 4-step student of an architecture."""
    return averaged_weights(output_dir / f"{arch}_4_step")


def assemble_pipeline(output_dir: Path, arch: str, weights: Path | None = None, student: Path | None = None):
    """A stock pipeline, float32, of the trained parts.

    Args:
        weights: averaged weights of the denoiser stage; the last ones by default. Every rung of the ladder works.
        student: `distilled_weights`, put into the denoiser; None: the denoiser itself.
    """
    architecture = ARCHITECTURES[arch]()
    folder = output_dir / arch
    tokenizers = load_tokenizers(folder, architecture)
    modules = build_denoiser(architecture, tokenizers)
    tensors = load_file(weights or averaged_weights(folder)) | (load_file(student) if student else {})
    for name, model in modules.items():
        prefix = name + "."
        model.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        model.eval()
    denoiser = modules.pop("denoiser")
    vae = load_autoencoder(output_dir)
    pipeline_class = getattr(diffusers, architecture.pipeline_class)
    if is_flow(architecture):
        vae.register_to_config(shift_factor=0.0)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**architecture.scheduler_config)
        return pipeline_class(transformer=denoiser, vae=vae, scheduler=scheduler, **modules, **tokenizers)
    return pipeline_class(
        unet=denoiser,
        vae=vae,
        scheduler=DDIMScheduler(**architecture.scheduler_config),
        **modules,
        **tokenizers,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
