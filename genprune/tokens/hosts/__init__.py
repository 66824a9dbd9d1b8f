"""Hosts of token reduction: what their blocks are called with, and where queries and keys can be read.

One file per kind of host. Each has one function `host_of(model)`, which gives a `TokenHost`, or None for a class that
it does not know.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Protocol

from torch import Tensor, nn

from genprune.errors import UnsupportedModel
from genprune.tokens.methods import TokenMethod
from genprune.tokens.state import TokenState

# Modules of this package, asked in this order.
HOSTS = (
    "timm_features",
    "timm_vit",
    "timm_bias",
    "timm_naflex",
    "timm_sam",
    "timm_encoders",
    "diffusion_transformers",
    "unet",
    "timm_refused",
)


class TokenHost(Protocol):
    """One model whose tokens can be reduced.

    Attributes:
        model: the module.
        paths: module path of each block, in the order in which they run; layers are indices into it.
        prefix: tokens before the patches, which always stay.
        patches: patches at the size that the model is made for.
        merges: whether merged tokens can be weighed where they are pooled or restored.
        before_mlp: whether its blocks can reduce between attention and MLP.
        scored: layers whose queries and keys can be read, so that tokens can be reduced there.
    """

    model: nn.Module
    paths: tuple[str, ...]
    prefix: int
    patches: int
    merges: bool
    before_mlp: bool
    scored: tuple[int, ...]

    def check(self, method: TokenMethod) -> None:
        """Raise `UnsupportedModel` where the method asks for what this model cannot do."""

    def attach(self, state: TokenState) -> list:
        """Put the hooks on; returns objects with `remove()`."""

    def example_inputs(self, model: nn.Module) -> dict[str, Tensor]:
        """Keyword arguments of one call at batch 1, on the device of `model`, a copy of the host (or on meta)."""


def twin_of(host: TokenHost, model: nn.Module) -> TokenHost:
    """The host of a copy of its model, for one call that scores: of a denoiser, with its settings of every step."""
    twin = host_of(model)
    if getattr(host, "denoiser", False):
        twin.settings = replace(host.settings, guidance="apart", early=(), every=1)
    return twin


def host_of(model: nn.Module) -> TokenHost:
    """The host of a model.

    Raises:
        UnsupportedModel: no file knows its class, or the class is known to be one where tokens cannot be reduced.
    """
    for name in HOSTS:
        host = importlib.import_module(f"genprune.tokens.hosts.{name}").host_of(model)
        if host is not None:
            return host
    raise UnsupportedModel(
        f"{type(model).__name__} is no model whose tokens genprune can reduce; expected a timm transformer with "
        "one sequence of tokens through all its blocks. `docs/tokens-supported.md` lists those of timm."
    )
