"""Drawing with, and measuring the training loss of, a whole miniature of either architecture."""

from __future__ import annotations

from torch import Tensor

from .denoiser import DenoiserStage, draw_latents
from .distillation import STEPS
from .mmdit import FlowStage, TextConditions, draw_flow_latents
from .text import tokenize

SAMPLER = {"steps": 20, "guidance_scale": 3.5}
STUDENT_SAMPLER = {"steps": STEPS, "guidance_scale": 1.0}


def sample_latents(pipeline, captions: list[str], seed: int, **sampler) -> Tensor:
    """Scaled latents `(B, 4, 16, 16)`; the noise of caption i is seeded by `seed + i`."""
    if not hasattr(pipeline, "transformer"):
        parts = (pipeline.unet, pipeline.text_encoder, pipeline.tokenizer, pipeline.scheduler)
        return draw_latents(*parts, captions, seed=seed, **sampler)
    conditions = TextConditions(pipeline.text_encoder, pipeline.text_encoder_2)
    return draw_flow_latents(pipeline.transformer, conditions, _tokenizers(pipeline), captions, seed, **sampler)


def loss_stage(pipeline, latents: Tensor, captions: list[str], batch_size: int = 64) -> DenoiserStage | FlowStage:
    """The training stage of a pipeline's denoiser on these pictures, without guidance dropout."""
    pool = {"latents": latents, "tokens": tokenize(pipeline.tokenizer, captions)}
    common = {"preview_captions": [], "batch_size": batch_size, "proportion_empty_prompts": 0.0}
    if not hasattr(pipeline, "transformer"):
        parts = (pipeline.unet, pipeline.text_encoder, pipeline.vae, pipeline.tokenizer, pipeline.scheduler)
        return DenoiserStage(*parts, pool, **common)
    pool["tokens_2"] = tokenize(pipeline.tokenizer_2, captions)
    modules = {
        "denoiser": pipeline.transformer,
        "text_encoder": pipeline.text_encoder,
        "text_encoder_2": pipeline.text_encoder_2,
    }
    return FlowStage(modules, pipeline.vae, _tokenizers(pipeline), pool, **common)


def _tokenizers(pipeline) -> dict:
    return {"tokenizer": pipeline.tokenizer, "tokenizer_2": pipeline.tokenizer_2}
