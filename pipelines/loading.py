"""Load a whole pipeline, dense or pruned, from a folder or the hub; with a plan, cut it while it loads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from genprune.errors import PlanMismatch, UnsupportedModel
from genprune.plan import PruningPlan
from genprune.slice_loading import load_cut

# What a pipeline needs of a repository that names genprune's classes: its components, not the single-file
# checkpoints that often lie at its top, and nothing that is unpickled.
_PIPELINE_FILES = ("*.json", "*/*.safetensors", "*/*.txt", "*/*.model")
ROUTED = "routed_config.json"  # in the folder of a routed pipeline, instead of model_index.json
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def load_pipeline(base: str | os.PathLike, plan: PruningPlan | str | os.PathLike | None = None, **kwargs: Any):
    """A stock diffusers pipeline from a folder or the hub; with `plan` its denoiser is cut while it is read.

    The folder of a routed pipeline gives a `RoutedPipeline`.

    Diffusers refuses a *hub* repository that names a foreign library, as a pruned pipeline does. Here such a
    repository is brought into the local cache and that folder is loaded; other repositories are fetched by diffusers.

    Args:
        base: a pipeline's folder, or a hub id such as `"stable-diffusion-v1-5/stable-diffusion-v1-5"`; dense or
            pruned before. A plan fits every fine-tune of the base that it was made for.
        plan: a `PruningPlan`, or the path of one. Only what it keeps is read, so that memory peaks at about the size
            of the pruned model; the result equals `gp.cut(pipeline, plan)` to the bit.
        **kwargs: for `DiffusionPipeline.from_pretrained`: `torch_dtype`, `variant`, components, ...

    Returns:
        The pipeline, of the stock class that the folder names; or the `RoutedPipeline`.

    Raises:
        PlanMismatch: the plan is for another model (found before any weight is read), or the folder is damaged.
        UnsupportedModel: the pipeline has no denoiser that genprune can cut, or `device_map` is given with a plan.
    """
    from diffusers import DiffusionPipeline

    folder = pipeline_folder(base, **kwargs)
    if (folder / ROUTED).is_file():
        return _routed(folder, plan, kwargs)
    if plan is None:
        return DiffusionPipeline.from_pretrained(folder, **kwargs)
    if kwargs.get("device_map") is not None:
        raise UnsupportedModel(
            f"device_map={kwargs['device_map']!r} together with a plan; a plan is cut while loading on one device. "
            "Leave device_map out and call .to(device) or .enable_model_cpu_offload() on the pipeline."
        )
    slot = _slot(folder)
    if slot in kwargs:
        raise PlanMismatch(
            f"both a plan and {slot}= are given; expected one. Cut that {slot} with gp.cut(model, plan)."
        )
    if not isinstance(plan, PruningPlan):
        plan = PruningPlan.load(plan)
    model = load_cut(folder / slot, plan, _dtype_of(slot, kwargs), _variant_of(folder / slot, kwargs))
    return DiffusionPipeline.from_pretrained(folder, **{slot: model}, **kwargs)


def _routed(folder: Path, plan: Any, kwargs: dict[str, Any]) -> Any:
    from genprune.pipelines.routed import RoutedPipeline

    if plan is not None:
        raise PlanMismatch(
            f"'{folder}' is a routed pipeline, whose experts have plans of their own, and a plan is given; expected "
            "none. Leave it out, or pass the dense pipeline."
        )
    return RoutedPipeline.from_pretrained(folder, **kwargs)


def pipeline_folder(base: str | os.PathLike, **kwargs: Any) -> Path:
    """The local folder of a pipeline: the folder itself, or where the hub's files were brought to.

    Args:
        base: a folder or a hub id.
        **kwargs: of `DiffusionPipeline.from_pretrained`.
    """
    if os.path.isdir(base):
        return Path(base)
    from diffusers import DiffusionPipeline
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    given = {key: kwargs[key] for key in _HUB_ARGUMENTS if kwargs.get(key) is not None}
    try:
        index = _index(Path(hf_hub_download(str(base), "model_index.json", **given)))
    except EntryNotFoundError as error:
        try:
            hf_hub_download(str(base), ROUTED, **given)
        except EntryNotFoundError:
            raise error from None
        return Path(snapshot_download(str(base), allow_patterns=list(_PIPELINE_FILES), **given))
    if any(isinstance(entry, list) and entry[0] == "genprune" for entry in index.values()):
        return Path(snapshot_download(str(base), allow_patterns=list(_PIPELINE_FILES), **given))
    return Path(DiffusionPipeline.download(str(base), **{**given, "variant": kwargs.get("variant")}))


def _index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanMismatch(
            f"'{path.parent}' has no {path.name}; expected a pipeline's folder. Pass the folder that "
            "pipe.save_pretrained wrote, or load one model with gp.load_model(folder)."
        ) from None
    except ValueError as error:
        raise PlanMismatch(f"'{path}' is not whole JSON ({error}). Save the pipeline again.") from None
    if not isinstance(index, dict):
        raise PlanMismatch(f"'{path}' holds a {type(index).__name__}; expected an object. Save the pipeline again.")
    return index


def _slot(folder: Path) -> str:
    index = _index(folder / "model_index.json")
    for slot in ("unet", "transformer"):
        if isinstance(index.get(slot), list) and index[slot][1] is not None:
            return slot
    raise UnsupportedModel(
        f"the pipeline in '{folder}' ({index.get('_class_name')}) has neither a `unet` nor a `transformer`; expected "
        "one to cut. Pass another pipeline, or leave the plan out."
    )


def _dtype_of(slot: str, kwargs: dict[str, Any]) -> torch.dtype | None:
    """The denoiser's dtype; diffusers takes one dtype or one for each component, and float32 for what is none."""
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    dtype = dtype.get(slot, dtype.get("default")) if isinstance(dtype, dict) else dtype
    return dtype if isinstance(dtype, torch.dtype) else None


def _variant_of(folder: Path, kwargs: dict[str, Any]) -> str | None:
    """The variant, where this component has it: diffusers takes the plain weights of components that do not."""
    variant = kwargs.get("variant")
    return variant if variant and any(f".{variant}." in f.name for f in folder.glob("*.safetensors*")) else None
