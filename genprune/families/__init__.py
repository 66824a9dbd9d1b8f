"""Families of host models: one file each lists its sites. Host knowledge lives here and nowhere else."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from genprune.errors import UnsupportedModel
from genprune.operators import Operator
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
class StockExport:
    """A plan said by a stock configuration: it loads where genprune is not installed.

    Args:
        config: the stock configuration, as `Family.build` takes it.
        rename: old state-dict prefix -> new prefix, or None where the tensors go. Prefixes end with a dot; a key
            that none of them begins keeps its name.
    """

    config: dict[str, Any]
    rename: dict[str, str | None]

    def renamed(self, key: str) -> str | None:
        """The name of a state-dict entry in the exported model, or None where it goes."""
        for old, new in self.rename.items():
            if key.startswith(old):
                return None if new is None else new + key[len(old) :]
        return key


def renumbered(path: str, gone: Sequence[bool]) -> dict[str, str | None]:
    """`StockExport.rename` for a list of modules of which some went.

    Args:
        path: the list's module path, such as `transformer_blocks`.
        gone: for each module of the list, whether it went.
    """
    rename, left = {}, 0
    for index, is_gone in enumerate(gone):
        if is_gone or left != index:
            rename[f"{path}.{index}."] = None if is_gone else f"{path}.{left}."
        left += not is_gone
    return rename


@dataclass(frozen=True)
class Family:
    """How genprune sees one family of hosts. A subclass per file in this folder; all methods are host knowledge.

    `hosts` are the class names served (matched against the whole inheritance chain, so subclasses work).
    `neighbours` and `first_blocks` are defaults of methods that remove blocks: how many neighbours may go together,
    and how many blocks at the start stay, where a family is known to recover badly without; None and 0: no rule.
    """

    name: str
    hosts: tuple[str, ...]
    library: str
    sample_argument: str = "sample"
    neighbours: int | None = None
    first_blocks: int = 0

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

    def refused(self, model: nn.Module) -> dict[str, str]:
        """What looks like a site, but cannot be cut exactly: site name -> reason (layer and cause)."""
        return {}

    def stock_config(
        self, model: nn.Module, sites: Sites, keep: Mapping[str, Tensor], ops: Sequence[Mapping[str, Any]] = ()
    ) -> StockExport | None:
        """The stock configuration that says the same as the masks, or None where there is none.

        Args:
            model: the dense model, or the one that was cut by these masks; only its configuration and the lengths of
                its module lists are read.
            sites: the sites of the dense model.
            keep: site name -> kept units of the dense model, as in `PruningPlan.keep`.
            ops: as in `PruningPlan.ops`, those in removed parts left out.
        """
        return None


# Host class name -> module of this package that serves it.
_SERVED = {
    "UNet2DConditionModel": "unet",
    "UNet2DModel": "unet",
    "FluxTransformer2DModel": "mmdit",
    "SD3Transformer2DModel": "mmdit",
    "DiTTransformer2DModel": "dit",
    "PixArtTransformer2DModel": "dit",
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
    for attribute in ("_orig_mod", "model", "module"):  # torch.compile, timm's feature extractors, DDP
        inner = getattr(model, attribute, None)
        if isinstance(inner, nn.Module) and any(cls.__name__ in _SERVED for cls in type(inner).__mro__):
            later = ", or compile after the cut" if attribute == "_orig_mod" else ""
            raise UnsupportedModel(
                f"{type(model).__name__} wraps a {type(inner).__name__}; expected that model itself. Pass "
                f"`model.{attribute}`{later}."
            )
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


def find_sites(target: Any, kinds: str | tuple[str, ...] | None = None) -> Sites:
    """Everything that can be cut from a model, or from a pipeline's denoiser.

    Args:
        target: a supported model, on any device (meta included), or a diffusers pipeline.
        kinds: only this kind or these kinds of `genprune.sites.KINDS`; default all.

    Returns:
        `Sites`: a mapping from site name to `Site`, in module order.

    Raises:
        UnsupportedModel: no family knows the class, or nothing of the model can be cut exactly. NoMatchingSites: it
        has no site of these kinds.
    """
    model = denoiser(target)
    family = family_of(model)
    refused = family.refused(model)
    # Sites that an earlier cut left without units are no sites any more, nor are those of layers that it replaced.
    replaced = [path for path, module in model.named_modules() if isinstance(module, Operator)]
    sites = (site for site in family.sites(model) if site.size and not (replaced and site.cuts_into(replaced)))
    found = Sites.of(type(model).__name__, sites, refused)
    if refused and not found:
        reasons = "; ".join(f"'{name}': {reason}" for name, reason in list(refused.items())[:3])
        raise UnsupportedModel(
            f"nothing of this {type(model).__name__} can be cut exactly ({reasons}). "
            f"Pass a model whose blocks are known; supported hosts: {', '.join(supported())}."
        )
    if kinds is None:
        return found
    return found.of_kind(*((kinds,) if isinstance(kinds, str) else kinds))
