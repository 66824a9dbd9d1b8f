"""A model as a user names it: a folder, a hub id, a timm name or `miniature`, opened with or without its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genprune.errors import GenpruneError, UnsupportedModel
from genprune.families import supported
from genprune.widths import PRUNING_KEY, apply_widths_, read_widths, skeleton

MINIATURE = "miniature"
# The embedded pipelines' names on the command line -> their names in `genprune.miniature`.
MINIATURES = {MINIATURE: "unet", "miniature-mmdit": "mmdit", "miniature-mmdit-4-step": "mmdit-4-step"}
_INDEX, _CONFIG = "model_index.json", "config.json"


class ModelNotFound(GenpruneError):
    """A name leads to no model: no such folder, no such repository, or no network."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model is and what it is, known before any weight is read.

    Args:
        name: as the user typed it.
        kind: `pipeline` (has a `model_index.json`), `model` (one diffusers model) or `timm`.
        place: local folder, hub id, or timm's model name: what the loading functions take.
        slot: the pipeline's component that is pruned, `unet` or `transformer`; empty otherwise.
        config: configuration of the model that is pruned.
    """

    name: str
    kind: str
    place: str
    slot: str
    config: dict[str, Any]

    @property
    def is_miniature(self) -> bool:
        return self.name in MINIATURES

    @property
    def call_options(self) -> dict[str, Any]:
        """What the pipeline has to be called with, beside steps and guidance, to draw as it was trained to."""
        if not self.is_miniature:
            return {}
        import genprune as gp

        options = gp.miniature.call_options(MINIATURES[self.name])
        return {key: value for key, value in options.items() if key not in ("num_inference_steps", "guidance_scale")}

    def skeleton(self) -> nn.Module:
        """The model that would be pruned, on the meta device: shapes without weights."""
        from genprune.saving import damage_named, model_class

        if self.kind != "timm":
            cls = model_class(self.config, self.place)
            with damage_named(self.place, cls.__name__):
                return skeleton(cls.from_config, self.config)
        model = skeleton(_timm_model, self.place, self.config, pretrained=False)
        if PRUNING_KEY in self.config:
            apply_widths_(model, read_widths(self.config[PRUNING_KEY], self.place))
        return model

    def load(self, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
        """The whole pipeline, or the bare model, with its weights.

        Args:
            device: where it is put.
            dtype: of the floating-point weights; default float32.

        Raises:
            ModelNotFound: timm has no weights of that name, or they cannot be fetched.
        """
        import genprune as gp

        if self.is_miniature:
            loaded = gp.miniature.load_pipeline(MINIATURES[self.name], torch_dtype=dtype or torch.float32)
            loaded.set_progress_bar_config(disable=True)
        elif self.kind == "pipeline":
            loaded = gp.load_pipeline(self.place, torch_dtype=dtype or torch.float32)
            loaded.set_progress_bar_config(disable=True)
        elif self.kind == "timm" and not Path(self.place).is_dir():
            loaded = _pretrained_timm(self.place, self.config).to(dtype=dtype)
        else:
            loaded = gp.load_model(self.place, dtype=dtype)
        return loaded.to(device)


def open_source(name: str) -> ModelSource:
    """Find out what a name stands for. Reads small JSON files only.

    Args:
        name: one of `MINIATURES`; a folder that diffusers, timm or genprune wrote; a timm model name (`timm/` before
            it is allowed); or a hub id such as `stable-diffusion-v1-5/stable-diffusion-v1-5`.

    Raises:
        ModelNotFound: it is none of these, or the hub cannot be reached. UnsupportedModel: it holds no denoiser.
    """
    if name in MINIATURES:
        folder = miniature_folder(MINIATURES[name])
        return _from_files(name, str(folder), _local_json(folder))
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_files(name, str(path), _local_json(path))
    if path.exists() or name.startswith((".", "/", "~")):
        found = "is a file" if path.exists() else "does not exist"
        raise ModelNotFound(f"'{name}' {found}; expected a model folder. Pass the folder that save_pretrained wrote.")
    if _is_timm_name(name.removeprefix("timm/")):
        return ModelSource(name, "timm", name.removeprefix("timm/"), "", {})
    if "/" not in name:
        raise _unreachable(name, "a hub id has the form owner/name")
    return _from_files(name, name, _hub_json(name))


def miniature_folder(name: str = "unet") -> Path:
    """An embedded pipeline's folder. Raises `ModelNotFound` where the package was built without its data."""
    import genprune as gp

    try:
        return gp.miniature.pipeline_dir(name)
    except FileNotFoundError as error:
        raise ModelNotFound(f"the embedded miniature is not there: {error}.") from None


def _from_files(name: str, place: str, read) -> ModelSource:
    """The source behind `read(file name) -> JSON data or None`."""
    index = read(_INDEX)
    if index is not None:
        for slot in ("unet", "transformer"):
            if index.get(slot, [None])[0] is not None:
                return ModelSource(name, "pipeline", place, slot, _required(name, f"{slot}/{_CONFIG}", read))
        raise UnsupportedModel(
            f"'{name}' is a {index.get('_class_name')} without a `unet` or `transformer`; expected a text-to-image "
            "diffusion pipeline. Pass another model."
        )
    config = _required(name, _CONFIG, read)
    if "_class_name" in config:
        return ModelSource(name, "model", place, "", config)
    if "architecture" in config:
        return ModelSource(name, "timm", place, "", config)
    raise UnsupportedModel(
        f"'{name}' has a {_CONFIG} without `_class_name` (diffusers) or `architecture` (timm); expected a model of "
        f"one of these classes: {', '.join(supported())}. Pass a diffusers or timm folder."
    )


def _required(name: str, file: str, read) -> dict[str, Any]:
    data = read(file)
    if data is None:
        raise ModelNotFound(
            f"'{name}' has neither {_INDEX} nor {_CONFIG}, or lacks {file}; expected a folder or repository that "
            "save_pretrained wrote. Check the name, or save the model again."
        )
    return data


def _parsed(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelNotFound(f"'{path}' is not whole JSON ({error}). Save the model again, or fetch it anew.") from None
    if not isinstance(data, dict):
        raise ModelNotFound(f"'{path}' holds a {type(data).__name__}; expected a JSON object. Save the model again.")
    return data


def _local_json(folder: Path):
    return lambda file: _parsed(folder / file) if (folder / file).is_file() else None


def _hub_json(repository: str):
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    def read(file: str) -> dict[str, Any] | None:
        try:
            return _parsed(Path(hf_hub_download(repository, file)))
        except EntryNotFoundError as error:
            if isinstance(error, FileNotFoundError):  # LocalEntryNotFoundError: no network and nothing cached
                raise _unreachable(repository, error) from None
            return None
        except (HFValidationError, OSError) as error:
            raise _unreachable(repository, error) from None

    return read


def _unreachable(repository: str, error: object) -> ModelNotFound:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelNotFound(
        f"'{repository}' is no folder and no timm model here, and the hub has no such repository or cannot be "
        f"reached ({reason}). Pass an existing folder, a timm model name, a hub id, or '{MINIATURE}'."
    )


def _is_timm_name(name: str) -> bool:
    try:
        import timm
    except ModuleNotFoundError:
        return False
    return timm.is_model(name)


def _timm_model(place: str, config: dict[str, Any], pretrained: bool) -> nn.Module:
    import timm

    name = config.get("architecture", place)
    extra = config.get("model_args", {}) if config else {}
    if config and "num_classes" in config:
        extra = {"num_classes": config["num_classes"], **extra}
    return timm.create_model(name, pretrained=pretrained, **extra)


def _pretrained_timm(place: str, config: dict[str, Any]) -> nn.Module:
    try:
        return _timm_model(place, config, pretrained=True)
    except (OSError, RuntimeError) as error:  # no network and nothing cached; an architecture without weights
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelNotFound(
            f"the weights of timm's '{place}' are not in the local cache and cannot be fetched ({reason}); expected "
            "them from the hub. Check the network, or pass a folder that gp.save_model wrote."
        ) from None
