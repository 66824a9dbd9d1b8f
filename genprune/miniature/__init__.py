"""The embedded miniature: a small, really trained, Stable-Diffusion-shaped text-to-image pipeline and its scenes.

    from genprune import miniature
    pipe = miniature.load_pipeline()
    image = pipe("a large cat on the left, blue background", num_inference_steps=20, guidance_scale=3.5).images[0]

It knows 20 objects at 64 px and nothing else; every result obtained on it has to say so. See `MODEL_CARD.md`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .grammar import Scene, caption, render, scenes

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from .grader import Grader

__all__ = ["Scene", "caption", "load_grader", "load_pipeline", "pipeline_dir", "prompts", "render", "scenes"]


def pipeline_dir() -> Path:
    """The folder of the embedded pipeline, in the layout of stock diffusers.

    Raises:
        FileNotFoundError: this copy of the package was built without its data files.
    """
    folder = Path(__file__).parent / "pipeline"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"no pipeline at {folder}; reinstall genprune with its package data, "
            "or train one with scripts/train_miniature.py"
        )
    return folder


def load_pipeline(**kwargs: Any) -> StableDiffusionPipeline:
    """The embedded pipeline through stock `StableDiffusionPipeline.from_pretrained`; keywords are passed on.

    Weights are stored in float16 and come back in float32 unless `torch_dtype` says otherwise.
    """
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(pipeline_dir(), **kwargs)


def prompts(split: str, n: int, seed: int = 0) -> list[str]:
    """Captions of `scenes(split, n, seed)`, in the same order."""
    return [caption(scene) for scene in scenes(split, n, seed)]


def load_grader() -> Grader:
    """The network that reads object, count, position, size and background back from a picture."""
    from .grader import load_grader as load

    return load()
