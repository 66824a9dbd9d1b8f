"""How pruned models are saved and loaded: the Pruned class after a cut, and bare models of either host by folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genprune.cutting import applied_plan, pruned_ops, pruned_widths, was_cut
from genprune.errors import GenpruneError, PlanMismatch, UnsupportedModel
from genprune.families import family_of, host_name, supported
from genprune.files import check_replaceable, whole_folder
from genprune.gates import gated_sites
from genprune.plan import PLAN_FILE
from genprune.widths import (
    PRUNING_KEY,
    apply_widths_,
    attach_saved_plan_,
    pruning_entry,
    read_ops,
    read_widths,
    skeleton,
)

_CONFIG = "config.json"
_ARGUMENTS = "genprune_model_args"  # what timm.create_model was given, in a timm model's config.json


def check_adoptable(model: nn.Module) -> None:
    """Refuse, before a cut changes anything, a model that could not become its Pruned class afterwards.

    Raises:
        UnsupportedModel: it is of the user's own subclass of a diffusers class, whose code a saved folder would lose.
    """
    if family_of(model).library != "diffusers":
        return
    from genprune.pruned_models import PRUNED

    if type(model) not in PRUNED and type(model) not in PRUNED.values():
        raise UnsupportedModel(
            f"{type(model).__name__} is a subclass of {host_name(model)}; expected exactly that class, because a "
            "pruned model is saved and loaded as it. Build one with "
            f"{host_name(model)}.from_config(model.config), load the weights into it, and cut that."
        )


def adopt_(model: nn.Module) -> None:
    """Turn a model that was just cut into its Pruned class, in place, with the widths in its configuration.

    The one `__class__` swap of the project; the Pruned class overrides nothing of the forward path. A timm model
    stays as it is (timm has no such hook: `save_model` writes its widths), and so does one that lost nothing.
    """
    if family_of(model).library != "diffusers" or not was_cut(model):
        return
    from genprune.pruned_models import PRUNED

    check_adoptable(model)
    model.__class__ = PRUNED.get(type(model), type(model))
    model.register_to_config(**{PRUNING_KEY: pruning_entry(pruned_widths(model), pruned_ops(model))})


def check_ungated(model: nn.Module) -> None:
    """Refuse to write a model while gates are attached: no file would hold a trace of them. Raises `PlanMismatch`."""
    if gated := gated_sites(model):
        raise PlanMismatch(
            f"gates are attached to {len(gated)} sites ('{gated[0]}', ...); a saved folder would hold the uncut "
            "weights without them. Call handle.remove() and gp.cut(model, plan) first, then save."
        )


# ---- bare models of either host, by folder --------------------------------------------------------------------------


def save_model(model: nn.Module, folder: str | os.PathLike) -> Path:
    """Write a dense or pruned model to a folder that `load_model` reads: JSON and safetensors, in its host's format.

    The folder appears whole or not at all; what was there before is replaced only at the end.

    Args:
        model: a supported model of diffusers or timm, without gates.
        folder: where to; made where it is missing.

    Returns:
        The folder's path.

    Raises:
        UnsupportedModel: no family knows the model, or timm cannot build it again from a file, because its modules
            were changed after it was built.
        PlanMismatch: gates are attached, or `folder` is a file or holds something else than a saved model.
    """
    family, folder = family_of(model), Path(folder)
    check_ungated(model)
    check_replaceable(folder, _CONFIG)
    with whole_folder(folder) as temporary:
        if family.library == "diffusers":
            model.save_pretrained(temporary)
        else:
            _save_timm(model, temporary)
    return folder


def _save_timm(model: nn.Module, folder: Path) -> None:
    import timm

    if not (getattr(model, "pretrained_cfg", None) or {}).get("architecture"):
        raise UnsupportedModel(
            f"this {type(model).__name__} names no timm architecture, because it was built from its class; expected a "
            "model of timm.create_model. Build it with timm.create_model(name, ...)."
        )
    entries: dict[str, Any] = {_ARGUMENTS: family_of(model).config(model)["model_args"]}
    if was_cut(model):
        entries[PRUNING_KEY] = pruning_entry(pruned_widths(model), pruned_ops(model))
    try:
        timm.models.save_for_hf(model, str(folder), model_config=entries, safe_serialization=True)
    except ValueError as error:
        raise UnsupportedModel(f"timm cannot describe this {type(model).__name__} in a file: {error}") from error
    _check_described(model, folder)
    if (plan := applied_plan(model)) is not None:
        plan.save(folder / PLAN_FILE)


def _check_described(model: nn.Module, folder: Path) -> None:
    """Refuse a timm model that `load_model` could not build again from the configuration just written for it."""
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    described = _timm_skeleton(folder, read_config(folder)).state_dict()
    described = {name: tuple(value.shape) for name, value in described.items()}
    for name in [*found, *described]:
        if found.get(name) != described.get(name):
            raise UnsupportedModel(
                f"'{name}' has shape {found.get(name, 'none')} in this {type(model).__name__}, and "
                f"{described.get(name, 'none')} by the arguments that it was built with; expected the same. Its "
                "modules were changed afterwards (as prune_intermediate_layers does): build it with timm.create_model "
                "and arguments that say so (such as depth=), load the weights into that, and save it."
            )


def load_model(
    folder: str | os.PathLike, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> nn.Module:
    """A model from a folder that `save_model` or its host wrote, dense or pruned, in evaluation mode.

    Args:
        folder: a diffusers model's folder (not a pipeline's) or a timm model's.
        device: where it is put.
        dtype: of its floating-point weights; default float32, as in both hosts.

    Raises:
        PlanMismatch: the folder is missing, half-written, damaged or hand-edited, or a newer genprune wrote it.
        UnsupportedModel: it holds a model that genprune does not know.
    """
    folder = Path(folder)
    config = read_config(folder)
    if "architecture" in config:
        return _load_timm(folder, config).to(device=device, dtype=dtype or torch.float32)
    cls = model_class(config, folder)
    with damage_named(folder, cls.__name__):
        model, info = cls.from_pretrained(
            folder, torch_dtype=dtype or torch.float32, use_safetensors=True, output_loading_info=True
        )
    if missing := info["missing_keys"]:  # a stock class fills them with random numbers, and warns
        raise PlanMismatch(
            f"'{folder}' lacks {len(missing)} tensors of its {cls.__name__} ('{sorted(missing)[0]}', ...); expected "
            "all of them. The folder is half-written or mixed from two models: save the model again."
        )
    return model.to(device)


# What diffusers raises on files that are not what they should be.
_DAMAGE = (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError)


@contextmanager
def damage_named(folder: str | os.PathLike, name: str) -> Iterator[None]:
    """Whatever the host stumbles over in a saved folder becomes a `PlanMismatch`."""
    try:
        yield
    except GenpruneError:
        raise
    except _DAMAGE as error:
        # diffusers goes on to recommend `ignore_mismatched_sizes`, which fills the model with uninitialised memory.
        reason = str(error).split(" If you want to instead", 1)[0].strip().rstrip(".")
        raise PlanMismatch(
            f"'{folder}' does not load as a {name} ({type(error).__name__}: {reason}); expected a whole config.json "
            "and the safetensors weights that it describes. The folder is half-written, edited or mixed from two "
            "models: save the model again, or fetch it anew."
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model's folder. Raises `PlanMismatch`, naming a pipeline's folder where it is one."""
    path = folder / _CONFIG
    if not path.is_file():
        if (folder / "model_index.json").is_file():
            raise PlanMismatch(
                f"'{folder}' holds a whole pipeline; expected the folder of one model. Pass its `unet` or "
                "`transformer` folder, or load it with gp.load_pipeline(folder)."
            )
        found = "has no config.json" if folder.is_dir() else "is no folder"
        raise PlanMismatch(f"'{folder}' {found}; expected a saved model. Pass a folder that gp.save_model wrote.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise PlanMismatch(
            f"'{path}' is not whole JSON ({error}). Save the model again, or restore the file."
        ) from None
    if not isinstance(config, dict) or not {"architecture", "_class_name"} & config.keys():
        raise PlanMismatch(
            f"'{path}' names neither a `_class_name` (diffusers) nor an `architecture` (timm). "
            "Save the model again, or restore the file."
        )
    return config


def model_class(config: dict[str, Any], folder: str | os.PathLike) -> type:
    """The diffusers class, or genprune's Pruned class, that a model's `config.json` names.

    Raises:
        PlanMismatch: the name does not fit the rest of the file.
        UnsupportedModel: it names no model of diffusers and none of genprune.
    """
    import diffusers

    from genprune.pruned_models import PRUNED

    name = config.get("_class_name")
    if not isinstance(name, str):
        raise PlanMismatch(
            f"the `_class_name` in the config of '{folder}' is {name!r}; expected the name of a class. "
            "Save the model again, or restore the file."
        )
    ours = {cls.__name__: cls for cls in PRUNED.values()}
    cls = ours.get(name) or getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise UnsupportedModel(
            f"'{folder}' holds a {name!r}, which is a model neither of diffusers nor of genprune; genprune prunes "
            f"{', '.join(supported())}. Upgrade the library, or pass another model."
        )
    if PRUNING_KEY in config and name not in ours:
        raise PlanMismatch(
            f"the config of '{folder}' has a '{PRUNING_KEY}' entry, but its `_class_name` is {name}; expected "
            f"{f'Pruned{name}' if f'Pruned{name}' in ours else 'a Pruned class'}. Save the model again, or restore "
            "the file."
        )
    return cls


def _timm_skeleton(folder: Path, config: dict[str, Any]) -> nn.Module:
    """The model that a folder's configuration describes, without its weights."""
    import timm

    model = skeleton(timm.create_model, f"local-dir:{folder}", pretrained=False)
    # timm adds defaults to the arguments that it was given; plans are matched by the given ones.
    model._model_args = config.get(_ARGUMENTS, model._model_args)
    if PRUNING_KEY in config:
        apply_widths_(model, read_widths(config[PRUNING_KEY], str(folder)), read_ops(config[PRUNING_KEY]))
    return model


def _load_timm(folder: Path, config: dict[str, Any]) -> nn.Module:
    model = _timm_skeleton(folder, config)
    _load_strictly_(model, folder / "model.safetensors")
    attach_saved_plan_(model, config, folder / PLAN_FILE)
    return model.eval()


def _load_strictly_(model: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise PlanMismatch(
            f"'{path}' is missing: the folder is half-written. Save the model again with gp.save_model."
        )
    try:
        model.load_state_dict(load_file(path), strict=True, assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise PlanMismatch(
            f"'{path}' does not hold the weights that the config beside it describes: {error} "
            "The folder is half-written or mixed from two models; save the model again with gp.save_model."
        ) from error
