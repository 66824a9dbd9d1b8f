"""The names that LoRA files give their tensors: diffusers', PEFT's, and (through diffusers' converters) kohya's."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from genprune.errors import PlanMismatch

_SLOTS = ("unet", "transformer")
_FOREIGN = ("lora_unet_", "lora_te", "lora_transformer_", "double_blocks.", "single_blocks.", "diffusion_model.")
_UNSLICEABLE = ("lokr_", "hada_", "dora_scale", "lora_magnitude_vector", "lora_embedding", "oft_", "boft_", "ia3_")
_SUFFIX = r"(?:\.(?!weight|bias)[\w-]+)?\.(?:weight|bias)"  # PEFT may put the adapter's name before `weight`
_PATTERNS = (
    ("down", re.compile(rf"(?P<path>.+)\.(?:lora_A|lora_down|lora\.down|lora_linear_layer\.down){_SUFFIX}")),
    ("up", re.compile(rf"(?P<path>.+)\.(?:lora_B|lora_up|lora\.up|lora_linear_layer\.up){_SUFFIX}")),
    ("down", re.compile(r"(?P<path>.+?)(?:\.processor)?\.(?P<layer>\w+)_lora\.down\.weight")),
    ("up", re.compile(r"(?P<path>.+?)(?:\.processor)?\.(?P<layer>\w+)_lora\.up\.weight")),
    ("alpha", re.compile(r"(?P<path>.+?)(?:\.lora)?\.alpha")),
)


@dataclass(frozen=True)
class LoraTensor:
    """One tensor of a LoRA file.

    Args:
        name: as in the file.
        path: of the denoiser's layer that it is for.
        part: `down` (`lora_A`, shape `(rank, in, ...)`), `up` (`lora_B` and its bias, `(out, rank, ...)`), `alpha`,
            or `unknown`.
    """

    name: str
    path: str
    part: str


def renamed_by(name: str, path: str, renamed: Callable[[str], str | None]) -> str:
    """A LoRA tensor's name with the layer's path renamed, whatever stands before the path and after the layer.

    Args:
        path: what `parsed(name)` gave.
        renamed: new name of a name that begins with a layer's path; must not drop it.
    """
    start = next(at for at in range(len(name)) if name.startswith(path.split(".", 1)[0] + ".", at))
    return name[:start] + renamed(name[start:])


def parsed(name: str) -> LoraTensor | None:
    """What a name says, or None where it is of another component than the denoiser (a text encoder)."""
    inner = name.removeprefix("base_model.model.")
    slot, _, rest = inner.partition(".")
    if slot.startswith(("text_encoder", "text_projection")):
        return None
    if slot in _SLOTS:
        inner = rest
    if not any(kind in inner for kind in _UNSLICEABLE):
        for part, pattern in _PATTERNS:
            if found := pattern.fullmatch(inner):
                layer = found.groupdict().get("layer")
                # Old attention processors: `attn1.processor.to_out_lora` is for `attn1.to_out.0`.
                end = "" if layer is None else ".to_out.0" if layer == "to_out" else f".{layer}"
                return LoraTensor(name, found["path"] + end, part)
    return LoraTensor(name, inner, "unknown")


def renamed_for_diffusers(state_dict: Mapping[str, Tensor], host: str, skeleton: nn.Module) -> dict[str, Tensor]:
    """The LoRA under diffusers' names; kohya's and others' go through diffusers' own converters, alpha folded in.

    Raises:
        PlanMismatch: diffusers has no converter for such names of this host.
    """
    state_dict = dict(state_dict)
    foreign = [name for name in state_dict if name.startswith(_FOREIGN)]
    if not foreign:
        return state_dict
    from diffusers import loaders

    try:
        if host == "UNet2DConditionModel":
            loader = loaders.StableDiffusionXLLoraLoaderMixin
            converted, alphas = loader.lora_state_dict(state_dict, unet_config=skeleton.config)[:2]
        elif host == "FluxTransformer2DModel":
            converted, alphas = loaders.FluxLoraLoaderMixin.lora_state_dict(state_dict, return_alphas=True)
        else:
            raise ValueError("diffusers has no converter for it")
    except (ValueError, KeyError, RuntimeError) as error:
        raise PlanMismatch(
            f"'{foreign[0]}' is not in diffusers' format, and it cannot be converted for {host} ({error}); expected "
            "names such as 'transformer.LAYER.lora_A.weight'. Load the LoRA on the dense base, write it with "
            "pipe.save_lora_weights, and adapt that file."
        ) from error
    return _alphas_folded(
        converted, {key.removesuffix(".alpha"): float(value) for key, value in (alphas or {}).items()}
    )


def _alphas_folded(state_dict: dict[str, Tensor], alphas: Mapping[str, float]) -> dict[str, Tensor]:
    """`lora_B` times alpha / rank, so that the LoRA needs no alpha any more.

    Args:
        alphas: alpha by the layer's name, or by the name of its `lora_A`, as the converter gives them.
    """
    folded = {}
    for name, value in state_dict.items():
        down = name.replace(".up.", ".down.").replace("lora_B", "lora_A")
        known = [alphas[key] for key in (down, name.split(".lora")[0]) if key in alphas and key != name]
        folded[name] = value * (known[0] / value.shape[1]) if known and down != name else value
    return folded


# ---- LoRA files -----------------------------------------------------------------------------------------------------


def read_lora(path: str | os.PathLike) -> dict[str, Tensor]:
    """A LoRA file's tensors, with the alphas of its metadata folded into `lora_B`.

    Raises:
        PlanMismatch: it is no whole safetensors file, or its metadata says DoRA.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise PlanMismatch(
            f"'{path}' cannot be read as a safetensors file ({error}); expected a LoRA in one `.safetensors` file. "
            "Pass its path, or the dictionary of its tensors."
        ) from None
    config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    return {name: _metadata_folded(name, value, config, path) for name, value in tensors.items()}


def _metadata_folded(name: str, value: Tensor, config: Mapping[str, Any], path: str | os.PathLike) -> Tensor:
    """One tensor, times alpha / rank where it is a `lora_B` and the file's metadata gives its component an alpha."""
    head, found, _ = name.partition(".lora_B.")
    component, _, inner = head.partition(".")
    prefix = f"{component}." if f"{component}.lora_alpha" in config else ""
    if not found or f"{prefix}lora_alpha" not in config:
        return value
    if config.get(f"{prefix}use_dora"):
        raise PlanMismatch(
            f"'{path}' is a DoRA, whose magnitudes change with the width of a layer; expected a plain LoRA. Merge it "
            "into the dense base and cut that."
        )
    patterns = config.get(f"{prefix}alpha_pattern") or {}
    layer, rank = inner if prefix else head, value.shape[-1]
    own = [alpha for key, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", layer)]
    alpha = (own or [config[f"{prefix}lora_alpha"]])[0]
    if value.ndim > 2:  # a convolution's: (out, rank, 1, 1)
        rank = value.shape[1]
    return (
        value * (alpha / (math.sqrt(rank) if config.get(f"{prefix}use_rslora") else rank)) if value.ndim > 1 else value
    )
