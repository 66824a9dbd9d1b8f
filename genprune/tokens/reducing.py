"""Shorten a sequence by a choice of tokens, and bring it back to full length. Differentiable in the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from genprune.errors import GenpruneError, nearest
from genprune.tokens.choice import Choice

REDUCTIONS = ("drop", "merge", "mlerp")
RESTORES = ("nearest", "own", "zeros")


def gather_tokens(x: Tensor, kept: Tensor, prefix: int) -> Tensor:
    """The prefix and the kept patches, in their order.

    Args:
        x: shape `(B, prefix + n, ...)`.
        kept: indices among the n patches, shape `(B, keep)`.
        prefix: tokens before the patches.

    Returns:
        Shape `(B, prefix + keep, ...)`.
    """
    index = kept + prefix
    if prefix:
        first = torch.arange(prefix, device=kept.device).expand(kept.shape[0], prefix)
        index = torch.cat([first, index], dim=1)  # (B, prefix + keep)
    return _rows(x, index)


def reduce_tokens(
    x: Tensor, choice: Choice, prefix: int, how: str = "drop", size: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The shorter sequence, and how many patches of the input each of its patches stands for.

    Args:
        x: hidden states, shape `(B, prefix + n, C)`.
        choice: which patches stay; `merge` and `mlerp` need its `target`.
        prefix: tokens before the patches; they pass unchanged.
        how: `drop` removed patches; `merge` each into its target (mean weighted by size); `mlerp`: the direction of
            that mean at the largest norm in the group.
        size: shape `(B, n)`; None: one each. Padding that is to vanish has size 0.

    Returns:
        Hidden states of shape `(B, prefix + keep, C)` in the dtype of x, and sizes of shape `(B, keep)` (None after
        dropping where there were none). Gradients flow into x.

    Raises:
        GenpruneError: an unknown `how`, or no target to merge into.

    Reference:
        merge: Token Merging (arXiv 2210.09461). mlerp: Token Fusion (Kim et al., arXiv 2312.01026).
    """
    if how not in REDUCTIONS:
        raise GenpruneError(
            f"reduce={how!r}{nearest(str(how), REDUCTIONS)}; expected one of {', '.join(REDUCTIONS)}. Pass one."
        )
    kept = choice.kept
    if kept.shape[1] == x.shape[1] - prefix:
        return x, size
    if how == "drop":
        return gather_tokens(x, kept, prefix), size.gather(1, kept) if size is not None else None
    if choice.target is None:
        raise GenpruneError(
            f"reduce={how!r} got a choice without target; expected for every patch the token it is merged into. "
            "Choose with LayerView(wants_target=True)."
        )
    patches, target = x[:, prefix:], choice.target
    patches = patches.to(torch.promote_types(x.dtype, torch.float32))  # sums of many bfloat16 numbers lose digits
    weight = torch.ones_like(target, dtype=patches.dtype) if size is None else size.to(patches.dtype)
    merged, total = _weighted_means(patches, weight, target, kept.shape[1])
    if how == "mlerp":
        merged = _at_largest_norm(merged, patches, target)
    return torch.cat([x[:, :prefix], merged.to(x.dtype)], dim=1), total


def _weighted_means(x: Tensor, weight: Tensor, target: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean of each group (B, groups, C) and its weight (B, groups)."""
    index = target[..., None].expand_as(x)
    total = weight.new_zeros(x.shape[0], groups).scatter_add(1, target, weight)
    sums = x.new_zeros(x.shape[0], groups, x.shape[2]).scatter_add(1, index, x * weight[..., None])
    return sums / total.clamp(min=torch.finfo(total.dtype).tiny)[..., None], total


def _at_largest_norm(means: Tensor, x: Tensor, target: Tensor) -> Tensor:
    """`means` (B, groups, C) rescaled to the largest norm among the tokens of their group."""
    norms = x.norm(dim=-1)  # (B, n)
    largest = norms.new_zeros(means.shape[:2]).scatter_reduce(1, target, norms, "amax")
    return means * (largest / means.norm(dim=-1).clamp(min=1e-12))[..., None]


def compose(kept_outer: Tensor, kept_inner: Tensor) -> Tensor:
    """Origins after two reductions: which patches of the first sequence `kept_inner` of the second stand for.

    Args:
        kept_outer: indices among n, shape `(B, k)`.
        kept_inner: indices among those k, shape `(B, m)`.

    Returns:
        Indices among n, shape `(B, m)`; sorted where both are.
    """
    return kept_outer.gather(1, kept_inner)


def restore_tokens(
    x: Tensor,
    kept: Tensor,
    count: int,
    prefix: int,
    how: str = "own",
    target: Tensor | None = None,
    own: Tensor | None = None,
) -> Tensor:
    """The full sequence: every kept token at its origin, removed ones filled in.

    Args:
        x: shape `(B, prefix + keep, C)`.
        kept: origins of its patches among `count`, shape `(B, keep)`.
        count: patches of the full sequence.
        prefix: tokens before the patches.
        how: `nearest`, a copy of the token that stands for it; `own`, its value when it was removed; `zeros`.
        target: for `nearest`: for every patch its position in `kept`, shape `(B, count)`.
        own: for `own`: values of all patches (those of kept ones do not matter), shape `(B, count, C)`.

    Returns:
        Shape `(B, prefix + count, C)`.

    Raises:
        GenpruneError: an unknown `how`, or the tensor it needs is missing.
    """
    if how not in RESTORES:
        raise GenpruneError(
            f"restore={how!r}{nearest(str(how), RESTORES)}; expected one of {', '.join(RESTORES)}. Pass one."
        )
    if kept.shape[1] == count:
        return x
    needed = {"nearest": target, "own": own, "zeros": x}[how]
    if needed is None:
        name = "target" if how == "nearest" else "own"
        raise GenpruneError(f"restore={how!r} got no {name}; expected a tensor over {count} patches. Pass {name}=.")
    first, patches = x[:, :prefix], x[:, prefix:]
    if how == "nearest":
        return torch.cat([first, _rows(patches, target)], dim=1)
    base = own.to(x.dtype) if how == "own" else x.new_zeros(x.shape[0], count, *x.shape[2:])
    index = kept.reshape(*kept.shape, *[1] * (x.ndim - 2)).expand_as(patches)
    return torch.cat([first, base.scatter(1, index, patches)], dim=1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B, N, ...) at index (B, m) -> (B, m, ...)."""
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))
