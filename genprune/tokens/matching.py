"""Which token resembles which: cosine of keys, the best match, and ToMe's alternate split."""

from __future__ import annotations

import torch
from torch import Tensor

from genprune.errors import GenpruneError
from genprune.tokens.choice import Choice

ROWS = 512  # of a similarity map at a time: no map beyond (ROWS, N) lies in memory


def unit_keys(k: Tensor, how: str = "mean") -> Tensor:
    """What tokens are compared by: their keys, at length 1.

    Args:
        k: keys, shape `(B, H, N, d)`.
        how: `mean` over heads (ToMe's choice, and cheap) or `concat` of them.

    Returns:
        Shape `(B, N, d)` or `(B, N, H * d)`, at least float32, so that a product of two rows is their cosine.
    """
    k = k.to(torch.promote_types(k.dtype, torch.float32))
    metric = k.mean(1) if how == "mean" else k.transpose(1, 2).flatten(2)  # (B, N, c)
    return metric / metric.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def best_match(a: Tensor, b: Tensor, shut: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The most similar row of `b` for every row of `a`.

    The map of all pairs exists a block of rows at a time, so that memory stays at `(B, ROWS, |b|)`; the arithmetic
    is |a| |b| c multiply-adds, for two halves of n tokens n^2 c / 4.

    Args:
        a: shape `(B, |a|, c)`, rows of length 1.
        b: shape `(B, |b|, c)`, rows of length 1.
        shut: bool of shape `(B, |b|)`, True for rows that nobody may match. None: all may be matched.

    Returns:
        Similarity and index in `b`, both of shape `(B, |a|)`.
    """
    columns = b.transpose(-1, -2)
    values, indices = [], []
    for rows in a.split(ROWS, dim=1):
        similarity = rows @ columns  # (B, ROWS, |b|)
        if shut is not None:
            similarity = similarity.masked_fill(shut[:, None], -torch.inf)
        value, index = similarity.max(dim=-1)
        values.append(value)
        indices.append(index)
    return torch.cat(values, dim=1), torch.cat(indices, dim=1)


def complement(kept: Tensor, count: int) -> Tensor:
    """The indices below `count` that are not in `kept` (B, keep), sorted, shape `(B, count - keep)`."""
    removed = torch.ones(kept.shape[0], count, dtype=torch.uint8, device=kept.device).scatter_(1, kept, 0)
    # A stable sort of 0s and 1s lists the kept ones, then the removed ones, each in their order.
    return removed.argsort(dim=1, stable=True)[:, kept.shape[1] :]


def own_positions(kept: Tensor, count: int) -> Tensor:
    """For every index below `count` its position in `kept`, where it is there; 0 elsewhere. Shape `(B, count)`."""
    positions = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    return torch.zeros(kept.shape[0], count, dtype=torch.int64, device=kept.device).scatter_(1, kept, positions)


def nearest_kept(metric: Tensor, kept: Tensor, shut: Tensor | None = None) -> Tensor:
    """For every patch the position in `kept` of the kept patch most similar to it (a kept one: its own).

    Args:
        metric: `unit_keys` of the patches, shape `(B, n, c)`.
        kept: sorted indices, shape `(B, keep)`.
        shut: bool of shape `(B, n)`, True for patches that nobody may match (padding).

    Returns:
        int64 of shape `(B, n)`.
    """
    count = metric.shape[1]
    target = own_positions(kept, count)
    if kept.shape[1] == count:
        return target
    removed = complement(kept, count)
    shut = shut.gather(1, kept) if shut is not None else None
    _, position = best_match(_rows(metric, removed), _rows(metric, kept), shut)
    return target.scatter_(1, removed, position)


def tome_matching(metric: Tensor, keep: int, prefix: int, padding: Tensor | None = None) -> Choice:
    """ToMe's bipartite soft matching: every second token may be merged into its best match among the others.

    Even positions of the whole sequence, prefix included, are the set A, odd ones the set B. Each token of A looks
    for its best match in B, and the `n - keep` pairs that are most similar merge. Prefix tokens stay apart in both
    sets.

    Args:
        metric: `unit_keys` of all tokens, shape `(B, N, c)`, N = prefix + n.
        keep: patches that stay; at most half of them can go.
        prefix: prefix tokens.
        padding: bool of shape `(B, n)`, True for padding: merged first where it is in A, never matched in B.

    Raises:
        GenpruneError: more than n // 2 patches would go.

    Reference:
        Token Merging (Bolya et al., arXiv 2210.09461), section 3 and appendix D.
    """
    tokens = metric.shape[1]
    patches = tokens - prefix
    gone = patches - keep
    if gone > patches // 2:
        raise GenpruneError(
            f"ToMe is to merge {gone} of {patches} patches in one layer; it pairs them, so that expected is at most "
            f"{patches // 2}. Spread the merges over more layers, or use gp.ZeroTPrune."
        )
    a, b = metric[:, ::2], metric[:, 1::2]
    first_a, first_b = (prefix + 1) // 2, prefix // 2  # the prefix tokens in each set
    # Position p of A is token 2 p, of B token 2 p + 1; from here on only patches, with patch = token - prefix.
    shut = padding[:, 2 * first_b + 1 - prefix :: 2] if padding is not None else None
    similarity, match = best_match(a[:, first_a:], b[:, first_b:], shut)  # (B, |A|)
    if padding is not None:
        similarity = similarity.masked_fill(padding[:, 2 * first_a - prefix :: 2], torch.inf)
    merged = similarity.topk(gone, dim=1).indices  # (B, gone) positions in A
    source = 2 * (merged + first_a) - prefix
    destination = 2 * (match.gather(1, merged) + first_b) + 1 - prefix
    kept = complement(source, patches)
    target = own_positions(kept, patches)
    return Choice(kept, target.scatter(1, source, target.gather(1, destination)))


def _rows(metric: Tensor, index: Tensor) -> Tensor:
    return metric.gather(1, index[..., None].expand(-1, -1, metric.shape[-1]))
