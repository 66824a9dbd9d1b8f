"""The embedded miniatures: small, really trained text-to-image pipelines, and the scenes that they draw.

    from genprune import miniature
    pipe = miniature.load_pipeline()
    image = pipe("a large cat on the left, blue background", **miniature.call_options()).images[0]

They know 20 objects at 64 px and nothing else; every result obtained on them has to say so. See `MODEL_CARD.md`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from genprune.errors import GenpruneError, nearest

from .grammar import Scene, caption, render, scenes

if TYPE_CHECKING:
    from diffusers import FluxPipeline, StableDiffusionPipeline

    from .grader import Grader

__all__ = [
    "NAMES",
    "Scene",
    "call_options",
    "caption",
    "load_grader",
    "load_pipeline",
    "pipeline_dir",
    "prompts",
    "render",
    "scenes",
]

# A: Stable-Diffusion-shaped. B: FLUX-shaped, guided by `true_cfg_scale`. B distilled to 4 steps, without guidance.
NAMES = ("unet", "mmdit", "mmdit-4-step")
_FOLDERS = {"unet": "pipeline", "mmdit": "pipeline_mmdit", "mmdit-4-step": "pipeline_mmdit"}
_DISTILLED = "transformer_4_step"
# FluxPipeline's own defaults are 128 latent pixels and 512 text tokens
_FLUX = {"height": 64, "width": 64, "max_sequence_length": 16}
_OPTIONS = {
    "unet": {"num_inference_steps": 20, "guidance_scale": 3.5},
    "mmdit": {"num_inference_steps": 20, "true_cfg_scale": 3.5, "negative_prompt": "", **_FLUX},
    "mmdit-4-step": {"num_inference_steps": 4, **_FLUX},
}


def pipeline_dir(name: str = "unet") -> Path:
    """The folder of an embedded pipeline, in the layout of stock diffusers.

    `mmdit-4-step` shares the folder of `mmdit`: only its transformer differs.

    Raises:
        GenpruneError: an unknown name. FileNotFoundError: this copy of the package was built without its data files.
    """
    folder = Path(__file__).parent / _FOLDERS[_checked(name)]
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"no pipeline at {folder}; reinstall genprune with its package data, "
            "or train one with scripts/train_miniature.py"
        )
    return folder


def load_pipeline(name: str = "unet", **kwargs: Any) -> StableDiffusionPipeline | FluxPipeline:
    """An embedded pipeline through stock `from_pretrained`; keywords are passed on.

    Weights are stored in float16 and come back in float32 unless `torch_dtype` says otherwise.

    Args:
        name: one of `NAMES`.

    Raises:
        GenpruneError: an unknown name. FileNotFoundError: see `pipeline_dir`.
    """
    import diffusers

    folder = pipeline_dir(name)
    if name == "unet":
        return diffusers.StableDiffusionPipeline.from_pretrained(folder, **kwargs)
    if name == "mmdit-4-step" and "transformer" not in kwargs:
        given = {key: kwargs[key] for key in ("torch_dtype",) if key in kwargs}
        kwargs["transformer"] = diffusers.FluxTransformer2DModel.from_pretrained(folder.parent / _DISTILLED, **given)
    pipe = diffusers.FluxPipeline.from_pretrained(folder, **kwargs)
    pipe.default_sample_size = 16  # so that the default picture is 64 px
    return pipe


def call_options(name: str = "unet") -> dict[str, Any]:
    """The keyword arguments that a miniature is meant to be called with: steps, guidance, size, text length."""
    return dict(_OPTIONS[_checked(name)])


def _checked(name: str) -> str:
    if name not in NAMES:
        raise GenpruneError(f"no miniature '{name}'{nearest(str(name), NAMES)}; expected one of {', '.join(NAMES)}.")
    return name


def prompts(split: str, n: int, seed: int = 0) -> list[str]:
    """Captions of `scenes(split, n, seed)`, in the same order."""
    return [caption(scene) for scene in scenes(split, n, seed)]


def load_grader() -> Grader:
    """The network that reads object, count, position, size and background back from a picture."""
    from .grader import load_grader as load

    return load()
