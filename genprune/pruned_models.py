"""The Pruned classes of diffusers' models: still the host's class, saved and loaded with their widths.

Their `__module__` is `genprune`, because a pipeline's model_index.json stores it: it is part of the file format.
"""

from __future__ import annotations

import functools
import inspect
import os
from pathlib import Path
from typing import Any

import diffusers.loaders.peft as host_adapters
from diffusers import (
    DiffusionPipeline,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    ModelMixin,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn

from genprune import ip_adapters, lora
from genprune.cutting import applied_plan
from genprune.errors import PlanMismatch
from genprune.plan import PLAN_FILE
from genprune.saving import check_ungated
from genprune.widths import PRUNING_KEY, apply_widths_, attach_saved_plan_, pruning_entry, read_ops, read_widths


class PrunedMixin:
    """Loading and saving of a model that was cut; nothing of the host's forward path is touched."""

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs: bool = False, **kwargs):
        """The model with the widths in `config["pruning"]`, its weights not loaded yet.

        Raises:
            PlanMismatch: the entry is missing or damaged, names sites that the model lacks, or is of a newer format.
        """
        if not isinstance(config, dict):
            config = cls.load_config(config)
        widths = read_widths(config.get(PRUNING_KEY), cls.__name__)
        ops = read_ops(config[PRUNING_KEY])
        stock = {key: value for key, value in config.items() if key != PRUNING_KEY}
        model, unused = super().from_config(stock, return_unused_kwargs=True, **kwargs)
        apply_widths_(model, widths, ops)
        model.register_to_config(**{PRUNING_KEY: pruning_entry(widths, ops)})
        return (model, unused) if return_unused_kwargs else model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """The host's `from_pretrained`; the plan that the model was cut by comes with it where it was saved.

        Raises:
            PlanMismatch: the folder is half-written (tensors missing), or its plan and its config disagree.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        if missing := info.get("missing_keys"):
            raise PlanMismatch(
                f"'{pretrained_model_name_or_path}' lacks {len(missing)} tensors of this {cls.__name__} "
                f"('{sorted(missing)[0]}', ...); expected all of them. The folder is half-written or mixed: save it "
                "again with save_pretrained."
            )
        if (path := _plan_file(pretrained_model_name_or_path, kwargs)) is not None:
            attach_saved_plan_(model, model.config, path)
        return (model, info) if wants_info else model

    @functools.wraps(ModelMixin.save_pretrained)  # a pipeline reads the signature to choose its arguments
    def save_pretrained(self, save_directory, *args, **kwargs):
        """The host's `save_pretrained`, with the plan's kept indices beside the weights.

        Raises:
            PlanMismatch: gates are attached: the file would hold the uncut weights without a trace of the gates.
        """
        check_ungated(self)
        if wrapped := [path for path, module in self.named_modules() if hasattr(module, "base_layer")]:
            raise PlanMismatch(
                f"an adapter is on {len(wrapped)} layers ('{wrapped[0]}', ...); a saved folder would have other names "
                "for their weights. Call fuse_lora() and unload_lora_weights() (or unload_lora()) first, then save."
            )
        if os.path.isfile(save_directory):
            raise PlanMismatch(f"'{save_directory}' is a file; expected a folder to write to. Pass another path.")
        _register_with_saving_pipeline(self)
        given = inspect.signature(ModelMixin.save_pretrained).bind(self, save_directory, *args, **kwargs).arguments
        writes_plan = given.get("is_main_process", True)
        if writes_plan:
            # No old plan ever lies beside new weights: an interrupt leaves a folder without plan, which still loads.
            (Path(save_directory) / PLAN_FILE).unlink(missing_ok=True)
            if given.get("push_to_hub"):  # the host uploads the folder before it returns
                _write_plan(self, save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)
        if writes_plan:
            _write_plan(self, save_directory)


class PrunedAdapterMixin(PrunedMixin):
    """LoRAs on a model that was cut: refused where they are for another shape, placed right where they fit."""

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict, prefix="transformer", hotswap=False, **kwargs):
        """The host's `load_lora_adapter`.

        Raises:
            PlanMismatch: the LoRA is for another model, such as the dense base; names `gp.adapt_lora`.
        """
        state_dict = pretrained_model_name_or_path_or_dict
        if not isinstance(state_dict, dict):
            state_dict, kwargs["metadata"] = _fetched_lora(state_dict, kwargs)
        lora.check_fits(self, state_dict, prefix)
        super().load_lora_adapter(state_dict, prefix=prefix, hotswap=hotswap, **kwargs)
        lora.scatter_adapters_(self)

    def _load_ip_adapter_weights(self, state_dicts, *args, **kwargs):
        """The host's, which `pipe.load_ip_adapter` calls.

        Raises:
            PlanMismatch: an attention that the adapter hooks into was cut.
        """
        ip_adapters.check_attention_whole(self, state_dicts)
        super()._load_ip_adapter_weights(state_dicts, *args, **kwargs)

    def add_adapter(self, adapter_config, adapter_name: str = "default") -> None:
        """The host's `add_adapter`, on the layers that are left."""
        super().add_adapter(lora.without_removed_layers(adapter_config, self), adapter_name)
        if hasattr(adapter_config, "exclude_modules"):
            self.peft_config[adapter_name].exclude_modules = adapter_config.exclude_modules  # as the user gave it
        lora.scatter_adapters_(self)


def _fetched_lora(source: str | os.PathLike, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The tensors and the metadata of a LoRA file or hub repository, as the host fetches them."""
    from diffusers.loaders.lora_base import _fetch_state_dict

    names = ("weight_name", "use_safetensors", "local_files_only", "cache_dir", "force_download", "proxies", "token")
    given = {name: kwargs.pop(name, None) for name in (*names, "revision", "subfolder", "metadata")}
    given["use_safetensors"] = True if given["use_safetensors"] is None else given["use_safetensors"]
    agent = {"file_type": "attn_procs_weights", "framework": "pytorch"}
    return _fetch_state_dict(source, **given, user_agent=agent, allow_pickle=False)


def _write_plan(model: nn.Module, folder: str | os.PathLike) -> None:
    if (plan := applied_plan(model)) is not None:
        plan.save(Path(folder) / PLAN_FILE)


def _register_with_saving_pipeline(model: nn.Module) -> None:
    """Where a pipeline is saving this model, have its index name the Pruned class.

    `cut(pipe.unet)` never sees the pipeline, whose index would go on naming the stock class. The pipeline writes its
    index after its components, so the one place to mend it is here, found by walking up the call stack.
    """
    frame = inspect.currentframe()
    while (frame := frame.f_back) is not None:
        pipeline = frame.f_locals.get("self")
        if isinstance(pipeline, DiffusionPipeline):
            for slot, component in pipeline.components.items():
                if getattr(component, "_orig_mod", component) is model:  # `_orig_mod`: compiled
                    pipeline.register_to_config(**{slot: (type(model).__module__, type(model).__name__)})
            return


def _plan_file(source: str | os.PathLike, kwargs: dict[str, Any]) -> Path | None:
    """The plan beside the weights, in a local folder or in a hub repository; None where there is none."""
    subfolder = kwargs.get("subfolder") or ""
    if os.path.isdir(source):
        path = Path(source) / subfolder / PLAN_FILE
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    same = ("revision", "cache_dir", "token", "local_files_only", "force_download")
    given = {key: kwargs[key] for key in same if kwargs.get(key) is not None}
    try:
        return Path(hf_hub_download(str(source), PLAN_FILE, subfolder=subfolder or None, **given))
    except EntryNotFoundError:
        return None


class PrunedUNet2DConditionModel(PrunedAdapterMixin, UNet2DConditionModel):
    """`UNet2DConditionModel` after `gp.cut`."""

    __module__ = "genprune"


class PrunedUNet2DModel(PrunedMixin, UNet2DModel):
    """`UNet2DModel` after `gp.cut`."""

    __module__ = "genprune"


class PrunedFluxTransformer2DModel(PrunedAdapterMixin, FluxTransformer2DModel):
    """`FluxTransformer2DModel` after `gp.cut`."""

    __module__ = "genprune"

    def named_modules(self, *args, **kwargs):
        """The host's `named_modules`; refuses a LoRA of the dense base that diffusers' Flux loader is about to bend.

        Before it calls `load_lora_adapter`, that loader widens the model's layers to fit the LoRA, or pads the LoRA to
        fit the layers. It begins by asking for the modules, which is the one moment to see both as they are.
        """
        caller = inspect.currentframe().f_back
        if caller.f_code.co_name == "_maybe_expand_transformer_param_shape_or_error_":
            lora.check_fits(self, caller.f_locals["lora_state_dict"] or {}, prefix="transformer")
        return super().named_modules(*args, **kwargs)


class PrunedSD3Transformer2DModel(PrunedAdapterMixin, SD3Transformer2DModel):
    """`SD3Transformer2DModel` after `gp.cut`."""

    __module__ = "genprune"


class PrunedDiTTransformer2DModel(PrunedMixin, DiTTransformer2DModel):
    """`DiTTransformer2DModel` after `gp.cut`."""

    __module__ = "genprune"


class PrunedPixArtTransformer2DModel(PrunedMixin, PixArtTransformer2DModel):
    """`PixArtTransformer2DModel` after `gp.cut`."""

    __module__ = "genprune"


# Host class -> its Pruned class.
PRUNED = {
    cls.__bases__[1]: cls
    for cls in (
        PrunedUNet2DConditionModel,
        PrunedUNet2DModel,
        PrunedFluxTransformer2DModel,
        PrunedSD3Transformer2DModel,
        PrunedDiTTransformer2DModel,
        PrunedPixArtTransformer2DModel,
    )
}

# diffusers expands nested LoRA scales by the class's name; a cut U-Net has the same blocks under the same names.
_expansions = host_adapters._SET_ADAPTER_SCALE_FN_MAPPING
_expansions["PrunedUNet2DConditionModel"] = _expansions["UNet2DConditionModel"]
