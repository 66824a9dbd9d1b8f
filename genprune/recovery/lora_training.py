"""LoRA-only recovery: an adapter on the layers that sites are made of, trained alone and saved as a LoRA."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from genprune.errors import GenpruneError, UnsupportedModel
from genprune.families import denoiser, denoiser_slot, find_sites

ADAPTER = "recovery"
_KINDS = ("heads", "neurons", "channels")


def lora_layers(model: nn.Module) -> list[str]:
    """Module paths of the layers that get a LoRA: attention projections, feed-forward and ResNet layers.

    Layers that a cut left without a side, or scattered, have none.
    """
    paths = []
    for site in find_sites(model).values():
        if site.kind in _KINDS:
            paths += [piece.module for piece in site.slices]
    plain = {name for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Conv2d)}
    return [path for path in dict.fromkeys(paths) if path in plain and model.get_submodule(path).weight.numel()]


def attach_lora(model: nn.Module, rank: int, seed: int) -> None:
    """Add the adapter through the host, in place; its first weights follow the seed.

    Raises:
        UnsupportedModel: no layer can take one. GenpruneError: another adapter is on the model already.
    """
    import torch
    from peft import LoraConfig

    if hasattr(model, "peft_config"):
        if ADAPTER in model.peft_config:
            return
        raise GenpruneError(
            f"the model has an adapter already ({', '.join(model.peft_config)}); expected none. Call "
            "pipe.unload_lora_weights() or model.delete_adapters(...) first."
        )
    layers = lora_layers(model)
    if not layers:
        raise UnsupportedModel(
            f"no layer of this {type(model).__name__} can take a LoRA; expected attention or feed-forward layers. "
            "Pass lora_rank=None to train all weights."
        )
    # whole paths in one pattern: names alone would match layers of other places too
    pattern = "^(" + "|".join(path.replace(".", r"\.") for path in layers) + ")$"
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=True, target_modules=pattern)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if hasattr(model, "add_adapter"):
            model.add_adapter(config, adapter_name=ADAPTER)
        else:
            from peft import inject_adapter_in_model

            inject_adapter_in_model(config, model, adapter_name=ADAPTER)
            model.peft_config = {ADAPTER: config}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()  # a LoRA of half-precision weights trains in float32


def save_lora(target: Any, folder: str | os.PathLike) -> None:
    """Write the trained LoRA as its host does: `pytorch_lora_weights.safetensors` in `folder`.

    `pipe.load_lora_weights(folder)`, or `model.load_lora_adapter(folder, prefix=None)`, puts it on the cut model
    again. For a timm model: the LoRA's tensors by name.
    """
    from pathlib import Path

    from peft.utils import get_peft_model_state_dict

    model = denoiser(target)
    if not hasattr(model, "save_lora_adapter"):
        from safetensors.torch import save_file

        tensors = get_peft_model_state_dict(model, adapter_name=ADAPTER)
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(tensors, Path(folder) / "pytorch_lora_weights.safetensors")
        return
    slot = denoiser_slot(target)
    if slot is None or not hasattr(target, "save_lora_weights"):
        model.save_lora_adapter(folder, adapter_name=ADAPTER)
        return
    from diffusers.utils import convert_state_dict_to_diffusers

    tensors = convert_state_dict_to_diffusers(get_peft_model_state_dict(model, adapter_name=ADAPTER))
    target.save_lora_weights(folder, **{f"{slot}_lora_layers": tensors})
