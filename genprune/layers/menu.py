"""The operator menu: what could stand in for each part of a model, found from its sites and one recorded call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from genprune.denoising.replay import ModelCall
from genprune.errors import GenpruneError, nearest
from genprune.operators import OPERATORS, build_operator
from genprune.operators.base import argument_names
from genprune.sites import Site, Sites

NARROWER = {"heads": "heads", "neurons": "neurons", "channels": "channels"}  # entry of the menu -> kind of site
ENTRIES = ("remove", *NARROWER, "low_rank", "separable", "pooled", "linear", "affine", "identity", "relu")


@dataclass(frozen=True)
class Offer:
    """One entry of the menu at one place.

    Args:
        name: unique, `PLACE=ENTRY`.
        paths: of the modules that it changes.
        operators: module path -> (operator, settings), fitted later.
        site, share: where units go instead: the site that keeps this share of them.
    """

    name: str
    paths: tuple[str, ...]
    operators: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    site: str | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Given:
    """One call of a module: arguments by name, and what it returned; tensors on the meta device."""

    arguments: Mapping[str, Any]
    output: Any


def check_menu(menu: Iterable[str]) -> None:
    """Raises `GenpruneError` for an unknown entry, or for none."""
    menu = tuple(menu)
    for entry in menu:
        if entry not in ENTRIES:
            raise GenpruneError(
                f"no operator '{entry}'{nearest(entry, ENTRIES)}; expected some of {', '.join(ENTRIES)}."
            )
    if not menu:
        raise GenpruneError(f"menu=() offers nothing; expected some of {', '.join(ENTRIES)}.")


def offers(
    model: nn.Module, sites: Sites, call: ModelCall, menu: Sequence[str], shares: Sequence[float]
) -> list[Offer]:
    """Everything on the menu but removals, in module order.

    Args:
        model: in evaluation mode.
        sites: of the model.
        call: one call, played once to see what each module is given and returns.
        menu: entries of `ENTRIES`. Narrower sites (`heads`, ...) keep a share of their units; `low_rank` factors the
            linear layers of an attention or feed-forward; `separable` the convolutions of a ResNet block; `pooled`
            resamplers; `linear` fits one map to a branch, ResNet block or block; `affine`, `identity` and `relu` take
            norms and activations.
        shares: of their units, or of their weights, that narrower sites and factored layers keep.
    """
    found = [
        Offer(f"{site.name}@{share:g}", _narrowed(site), site=site.name, share=share)
        for site in sites.values()
        for share in shares
        if site.kind in menu and site.kind in NARROWER and site.size > 1
    ]
    if "low_rank" in menu:
        found += _factored(model, sites, shares)
    if "separable" in menu:
        found += _separable(model, sites)
    if "linear" in menu:
        found += _linear(model, sites, call)
    found += _everywhere(model, [entry for entry in menu if entry in ("pooled", "affine", "identity", "relu")])
    return found


def _narrowed(site: Site) -> tuple[str, ...]:
    """The modules that narrowing a site touches."""
    return tuple(dict.fromkeys((site.path, *(piece.module for piece in site.slices))))


def _factored(model: nn.Module, sites: Sites, shares: Sequence[float]) -> Iterator[Offer]:
    """Low-rank factors of all linear layers of one attention or feed-forward."""
    for site in sites.values():
        if site.kind not in ("heads", "neurons"):
            continue
        layers = dict.fromkeys(piece.module for piece in site.slices)
        plain = {path: model.get_submodule(path) for path in layers}
        if not all(type(layer) is nn.Linear for layer in plain.values()):
            continue
        for share in shares:
            operators = {}
            for path, layer in plain.items():
                out, width = layer.weight.shape
                rank = int(share * out * width / (out + width))
                if 1 <= rank < min(out, width):
                    operators[path] = ("low_rank", {"rank": rank})
            if operators:
                yield Offer(f"{site.path}=low_rank@{share:g}", tuple(operators), operators)


def _separable(model: nn.Module, sites: Sites) -> Iterator[Offer]:
    """Depthwise and pointwise factors of the convolutions of one ResNet block."""
    for site in sites.values():
        if site.kind != "channels":
            continue
        convolutions = dict.fromkeys(
            piece.module for piece in site.slices if isinstance(model.get_submodule(piece.module), nn.Conv2d)
        )
        for multiplier in (1, 2):
            operators = {
                path: ("separable", {"multiplier": multiplier})
                for path in convolutions
                if _stands(model, path, "separable", {"multiplier": multiplier})
            }
            if operators:
                yield Offer(f"{site.path}=separable@{multiplier}", tuple(operators), operators)


def _linear(model: nn.Module, sites: Sites, call: ModelCall) -> Iterator[Offer]:
    """One map in place of a branch, a ResNet block or a block."""
    places = {
        site.emptied[0].module: site for site in sites.values() if site.kind in ("branch", "block") and site.emptied
    }
    seen = observed(model, places, call)
    for path, site in places.items():
        # What stays of a removed block is called by the host from outside: the embeddings in DiT's first block.
        if site.kind == "block" and any(True for _ in site.emptied[0].build(model.get_submodule(path)).parameters()):
            continue
        settings = linear_settings(site, seen.get(path))
        if settings is not None and _stands(model, path, "linear", settings):
            yield Offer(f"{path}=linear", (path,), {path: ("linear", settings)})


def _everywhere(model: nn.Module, entries: Sequence[str]) -> Iterator[Offer]:
    for path, module in model.named_modules():
        for entry in entries:
            if path and OPERATORS[entry].refuses(module) is None and _stands(model, path, entry, {}):
                yield Offer(f"{path}={entry}", (path,), {path: (entry, {})})


def _stands(model: nn.Module, path: str, operator: str, settings: Mapping[str, Any]) -> bool:
    with torch.device("meta"):
        try:
            build_operator(operator, model.get_submodule(path), settings)
        except GenpruneError:
            return False
    return True


# ---- what modules are given and return ------------------------------------------------------------------------------


class _Observer:
    """Keeps the first call of one module as shapes."""

    def __init__(self, module: nn.Module):
        self.names, self.given = argument_names(module), None
        self.handle = module.register_forward_hook(self.hook, with_kwargs=True)

    def hook(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
        if self.given is None:
            self.given = Given(_meta({**dict(zip(self.names, args)), **kwargs}), _meta(output))


@torch.no_grad()
def observed(model: nn.Module, paths: Iterable[str], call: ModelCall) -> dict[str, Given]:
    """Module path -> its first call while `call` is played; modules that never ran are left out."""
    observers = {path: _Observer(model.get_submodule(path)) for path in paths}
    try:
        call.play(model)
    finally:
        for observer in observers.values():
            observer.handle.remove()
    return {path: observer.given for path, observer in observers.items() if observer.given is not None}


def _meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, Mapping):
        return {name: _meta(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_meta(item) for item in value)
    return value


def linear_settings(site: Site, seen: Given | None) -> dict[str, Any] | None:
    """Settings of the `linear` operator in place of a branch or block; None where its outputs fit no input.

    A block's outputs continue the arguments that its site names; a branch's follow its first tensors in order. What
    adds to its input (a block, a ResNet block of equal channels) is fitted as input plus map.
    """
    if seen is None:
        return None
    outputs = seen.output if isinstance(seen.output, (tuple, list)) else (seen.output,)
    named = site.gates[0].blend or tuple(n for n, value in seen.arguments.items() if isinstance(value, Tensor))
    streams: list[list[Any] | None] = []
    for name, output in zip(named, outputs):
        given = seen.arguments.get(name)
        if output is None:
            streams.append(None)
            continue
        if not isinstance(given, Tensor) or not isinstance(output, Tensor) or given.ndim != output.ndim:
            return None
        dim = 1 if given.ndim == 4 else -1
        if given.select(dim, 0).shape != output.select(dim, 0).shape:
            return None
        streams.append([name, given.shape[dim], output.shape[dim]])
    if len(streams) != len(outputs) or not any(streams):
        return None
    adds = bool(site.gates[0].blend) or (site.emptied[0].module == site.path and outputs[0].ndim == 4)
    same = all(stream is None or stream[1] == stream[2] for stream in streams)
    return {
        "streams": streams,
        "returns": "tuple" if isinstance(seen.output, (tuple, list)) else "tensor",
        "residual": adds and same,
    }
