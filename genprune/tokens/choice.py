"""What a method of token reduction is told about a layer, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from genprune.errors import GenpruneError


@dataclass(frozen=True)
class LayerView:
    """The layer that just ran, as a method sees it. N tokens: `prefix` of them first, then n patches.

    Args:
        prefix: prefix tokens (class, distillation, registers). They are never candidates, but vote and receive votes.
        class_token: whether token 0 is a class token.
        scale: of `q k^T`.
        layer: 0-based index of the layer.
        depth: number of layers.
        bias: added to the attention logits (relative positions, log sizes), broadcastable to `(B, H, N, N)`.
        valid: bool of shape `(B, n)`, False for padding, which goes first. None: no padding.
        size: how many patches of the input each patch stands for, shape `(B, n)`. None: one each.
        wants_target: whether `Choice.target` is needed even when tokens are dropped (to restore a removed token as a
            copy of the most similar kept one).
    """

    prefix: int
    class_token: bool
    scale: float
    layer: int = 0
    depth: int = 1
    bias: Tensor | None = None
    valid: Tensor | None = None
    size: Tensor | None = None
    wants_target: bool = False


@dataclass(frozen=True)
class Choice:
    """Which patches stay.

    Args:
        kept: SORTED indices among the n patches (the prefix is not counted), int64 of shape `(B, keep)`.
        target: for every patch the position in `kept` of the token that stands for it (a kept one: its own), int64
            of shape `(B, n)`; None where nobody asked.
    """

    kept: Tensor
    target: Tensor | None = None


def check_count(keep: int, patches: int) -> None:
    """Raises `GenpruneError` unless 1 <= keep <= patches."""
    if not 1 <= keep <= patches:
        raise GenpruneError(
            f"{keep} patches to keep of {patches}; expected 1 to {patches}. Give the layer another count or share in "
            "keep={layer: share}."
        )
