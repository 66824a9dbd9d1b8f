"""Families of host models: one file each lists its sites. Host knowledge lives here and nowhere else."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from genprune.errors import UnsupportedModel
from genprune.sites import Site, Sites


@dataclass(frozen=True)
class OperatingPoint:
    """The input shape that MACs and latency are counted at. Unset fields take the family's default.

    Args:
        height, width: of the denoiser's input, in latent pixels (in image pixels for a ViT).
        text_length: text tokens.
        batch: rows.
    """

    height: int
    width: int
    text_length: int = 0
    batch: int = 1


@dataclass(frozen=True)
class Family:
    """How genprune sees one family of hosts. A subclass per file in this folder; all methods are host knowledge.

    `hosts` are the class names served (matched against the whole inheritance chain, so subclasses work).
    """

    name: str
    hosts: tuple[str, ...]
    library: str
    sample_argument: str = "sample"
    extra: dict[str, Any] = field(default_factory=dict)

    def sites(self, model: nn.Module) -> list[Site]:
        """Every site of the model, in module order, parents after children."""
        raise NotImplementedError

    def operating_point(self, model: nn.Module, **given: int) -> OperatingPoint:
        """The family's default operating point for this model, with `given` fields replaced."""
        raise NotImplementedError

    def example_inputs(
        self, model: nn.Module, point: OperatingPoint, device: torch.device | str, dtype: torch.dtype
    ) -> dict[str, Any]:
        """Keyword arguments for one forward call at the operating point; random values on a real device."""
        raise NotImplementedError

    def build(self, config: dict[str, Any]) -> nn.Module:
        """A dense model from its configuration, on the device and dtype in force (meta under `torch.device`)."""
        raise NotImplementedError

    def config(self, model: nn.Module) -> dict[str, Any]:
        """The dense configuration as plain JSON data, without genprune's own key: what plans are matched by."""
        raise NotImplementedError

    def stock_config(self, model: nn.Module, plan) -> dict[str, Any] | None:
        """The stock configuration that says the same as `plan`, with `renames`, or None where there is none."""
        return None


# Host class name -> module of this package that serves it.
_SERVED = {
    "UNet2DConditionModel": "unet",
    "UNet2DModel": "unet",
    "FluxTransformer2DModel": "mmdit",
    "SD3Transformer2DModel": "mmdit",
    "VisionTransformer": "vit",
}


def supported() -> tuple[str, ...]:
    """Names of the host classes that genprune can list sites for."""
    return tuple(_SERVED)


def family_of(model: nn.Module) -> Family:
    """The family of a model. Raises `UnsupportedModel`, naming what is supported."""
    for cls in type(model).__mro__:
        if cls.__name__ in _SERVED:
            return family_named(cls.__name__)
    raise UnsupportedModel(
        f"{type(model).__name__} is not a model that genprune can prune; supported: {', '.join(supported())}. "
        "Pass one of those, or a diffusers pipeline that holds one as `unet` or `transformer`."
    )


def family_named(host: str) -> Family:
    """The family that serves a host class name. Raises `UnsupportedModel`."""
    if host not in _SERVED:
        raise UnsupportedModel(f"no family serves '{host}'; supported: {', '.join(supported())}.")
    module = importlib.import_module(f"genprune.families.{_SERVED[host]}")
    for family in module.FAMILIES:
        if host in family.hosts:
            return family
    raise UnsupportedModel(f"no family serves '{host}'; supported: {', '.join(supported())}.")


def host_name(model: nn.Module) -> str:
    """The served class name in a model's inheritance chain (`PrunedUNet2DModel` -> `UNet2DModel`)."""
    family_of(model)
    return next(cls.__name__ for cls in type(model).__mro__ if cls.__name__ in _SERVED)


def denoiser_slot(target: Any) -> str | None:
    """The attribute of a pipeline that holds its denoiser (`unet` or `transformer`), or None for a bare model."""
    if isinstance(target, nn.Module):
        return None
    for slot in ("unet", "transformer"):
        if isinstance(getattr(target, slot, None), nn.Module):
            return slot
    raise UnsupportedModel(
        f"{type(target).__name__} is neither a torch module nor a pipeline with a `unet` or `transformer`. "
        f"Pass a diffusers pipeline, or a model of one of these classes: {', '.join(supported())}."
    )


def denoiser(target: Any) -> nn.Module:
    """The model to prune: the target itself, or a pipeline's denoiser."""
    slot = denoiser_slot(target)
    return target if slot is None else getattr(target, slot)


def find_sites(target: Any, kinds: tuple[str, ...] | None = None) -> Sites:
    """Everything that can be cut from a model, or from a pipeline's denoiser.

    Args:
        target: a supported model, on any device (meta included), or a diffusers pipeline.
        kinds: only these kinds of `genprune.sites.KINDS`; default all.

    Returns:
        `Sites`: a mapping from site name to `Site`, in module order.

    Raises:
        UnsupportedModel: no family knows the class. NoMatchingSites: no site is left.
    """
    model = denoiser(target)
    found = Sites.of(type(model).__name__, family_of(model).sites(model))
    return found if kinds is None else found.of_kind(*kinds)
