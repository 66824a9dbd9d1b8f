"""Zero-TPrune: rank tokens by PageRank over the attention graph, then drop the redundant and the unimportant.

In the paper's order (Wang et al., arXiv 2305.17328, CVPR 2024; no code was released):

1. `start_scores`, `page_rank`: Weighted Page Rank (WPR), s <- A^T s, per head.
2. `head_filter`, `combine_heads`: Variance-based Head Filter (VHF) and Emphasizing Informative Region (EIR).
3. `redundant`: the similarity stage S.
4. `choose_tokens`: a whole pruning layer, I' -> S -> I.

B batch, H heads, N tokens = prefix + n patches, d head width. Scores s have mean 1 over the tokens that take part (sum
N, not 1: on that scale the published bounds of the head filter make sense). `alive` marks the tokens that take part:
not padding, and not removed by an earlier stage. Shapes do not depend on the data, so that everything compiles.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from genprune.tokens.choice import Choice, check_count
from genprune.tokens.matching import best_match, complement, nearest_kept

SPLITS = ("alternate", "halves")


def vote_weights(q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """The attention map A = softmax((scale q k^T + bias) / temperature), at least float32.

    Args:
        q: queries of the R voters, shape `(B, H, R, d)`.
        k: keys, shape `(B, H, N, d)`.
        bias: broadcastable to `(B, H, R, N)`; -inf shuts a column.
        temperature: > 0; below 1 votes concentrate on fewer tokens.

    Returns:
        Rows that sum to 1, shape `(B, H, R, N)`.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(dtype) * (scale / temperature)) @ k.to(dtype).transpose(-1, -2)
    if bias is not None:
        logits = logits.add_(bias.to(dtype) / temperature)
    return logits.softmax(-1)


def start_scores(alive: Tensor, class_weighted: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """The scores that WPR starts from, mean 1 over living tokens and 0 elsewhere.

    Args:
        alive: bool, shape `(B, N)`.
        class_weighted: s0[class] = sqrt(N) s0[any other token], the class token being token 0. Otherwise uniform.

    Returns:
        Shape `(B, N)`.
    """
    start = alive.to(dtype)
    count = start.sum(-1, keepdim=True)  # (B, 1)
    if class_weighted:
        start = torch.cat([start[:, :1] * count.sqrt(), start[:, 1:]], dim=1)
    return start * (count / start.sum(-1, keepdim=True))


def page_rank(votes: Tensor, steps: int, start: Tensor, alive: Tensor | None = None) -> Tensor:
    """Importance of each token: votes passed along the attention graph, higher = keep.

    After a removal rows are divided by what they give to the living, which is the softmax over their keys alone: the
    survivors' part of A is never written down, and removing tokens costs two more products with a vector.

    There is no damping and no renormalisation: rows of A sum to 1, so that the sum of s stays. Few steps are meant:
    A^T has one fixed point, and in the limit the start is forgotten, a class token's weight with it.

    Args:
        votes: A, shape `(B, H, R, N)`; row i is how voter i splits its vote. R = N for steps > 1.
        steps: updates, >= 1. Fixed per layer, so that the loop compiles.
        start: first scores of the voters, 0 for one that is not alive, shape `(B, R)` or `(B, H, R)`.
        alive: bool, shape `(B, N)`; None: all.

    Returns:
        Shape `(B, H, N)`, 0 where not alive.

    Reference:
        Zero-TPrune, Weighted Page Rank: s_{t+1}[j] = sum_i A[i, j] s_t[i], that is s <- A^T s.
    """
    scores = (start if start.ndim == 3 else start[:, None])[:, :, None]  # (B, 1 or H, 1, R)
    if alive is None:
        for _ in range(steps):
            scores = scores @ votes  # (B, H, 1, N)
        return scores[:, :, 0]
    living = alive.to(votes.dtype)[:, None, None]  # (B, 1, 1, N)
    given = votes @ living.expand(-1, votes.shape[1], -1, -1).transpose(-1, -2)  # (B, H, R, 1)
    # A voter all of whose attention was on removed tokens (87 nats above the rest) has no say, rather than NaN.
    given = given.clamp(min=torch.finfo(votes.dtype).tiny).transpose(-1, -2)
    for _ in range(steps):
        scores = ((scores / given) @ votes) * living
    return scores[:, :, 0]


def head_filter(scores: Tensor, alive: Tensor, prefix: int, bounds: tuple[float, float]) -> Tensor:
    """VHF: which heads tell tokens apart without one corner taking all votes.

    Args:
        scores: mean 1, shape `(B, H, N)`.
        alive: bool, shape `(B, N)`.
        prefix: tokens that the variance does not count.
        bounds: a head stays where the variance of its scores over living patches lies within.

    Returns:
        Weights 0 and 1 of shape `(B, H)`. All 1 where no head would stay.
    """
    patches, weight = scores[:, :, prefix:], alive[:, None, prefix:].to(scores.dtype)  # (B, H, n), (B, 1, n)
    count = weight.sum(-1, keepdim=True).clamp(min=1)
    mean = (patches * weight).sum(-1, keepdim=True) / count
    variance = ((patches - mean).square() * weight).sum(-1) / count[..., 0]  # (B, H)
    stays = ((variance >= bounds[0]) & (variance <= bounds[1])).to(scores.dtype)
    return torch.where(stays.sum(1, keepdim=True) > 0, stays, torch.ones_like(stays))


def combine_heads(scores: Tensor, how: str = "rms", weight: Tensor | None = None) -> Tensor:
    """One score per token from those of the heads.

    Args:
        scores: shape `(B, H, N)`.
        how: `rms` (EIR), s[i] = sqrt(sum_h w_h s_h[i]^2 / sum_h w_h): a token vital in one head outranks one that is
            mediocre in all. `mean`: the plain mean.
        weight: of heads, shape `(B, H)`. None: all alike.

    Returns:
        Shape `(B, N)`.
    """
    powers = scores.square() if how == "rms" else scores
    if weight is None:
        combined = powers.mean(1)
    else:
        combined = (powers * (weight / weight.sum(1, keepdim=True))[..., None]).sum(1)
    return combined.sqrt() if how == "rms" else combined


def redundant(metric: Tensor, importance: Tensor, count: int, alive: Tensor, split: str = "halves") -> Tensor:
    """The similarity stage S: the `count` patches that another, more important patch resembles most.

    Patches are sorted by importance. With `halves` the less important n // 2 are set A and the rest B, the paper's
    "Sequential-U"; with `alternate` A is every second one, so that near duplicates, which are alike in importance,
    land in different sets. Every patch of A looks for its most similar one in B; those of A with the most similar
    partner go.

    Args:
        metric: rows of length 1 (unit keys), shape `(B, n, c)`. See `matching.best_match` for the cost.
        importance: shape `(B, n)`, higher = more important.
        count: patches that go, at most n // 2.
        alive: bool, shape `(B, n)`; what is not alive goes first, and nobody is compared with it.
        split: `halves` or `alternate`.

    Returns:
        Indices of the patches that go, int64 of shape `(B, count)`, in no order.
    """
    half = importance.shape[1] // 2
    order = importance.masked_fill(~alive, -torch.inf).argsort(dim=1, stable=True)  # least important first
    if split == "alternate":
        turn = torch.arange(order.shape[1], device=order.device) % 2  # A, B, A, B, ...
        turn = torch.where(alive.gather(1, order), turn, -1)  # what is not alive is in A, however many there are
        order = order.gather(1, turn.argsort(dim=1, stable=True))
    rows = metric.gather(1, order[..., None].expand_as(metric))
    living = alive.gather(1, order)
    similarity, _ = best_match(rows[:, :half], rows[:, half:], ~living[:, half:])  # (B, n // 2)
    similarity = similarity.masked_fill(~living[:, :half], torch.inf)
    return order.gather(1, similarity.topk(count, dim=1).indices)


class Graph(Protocol):
    """Who votes for whom: the attention of a layer, held as a map or not."""

    def scores(self, alive: Tensor, class_weighted: bool, steps: int, everyone: bool = False) -> Tensor:
        """Votes among the living tokens (bool `(B, N)`), shape `(B, H, N)`; rows are normalised over them alone.

        `everyone` says that all are alive, which a tensor cannot say before it is computed.
        """


class DenseGraph:
    """The attention graph as one map `(B, H, R, N)`: the votes of all tokens, or of R of them.

    Args:
        votes: see `vote_weights`.
        voters: which tokens the rows are, shape `(R,)`. None: all, in order.
        weight: how many tokens each voter speaks for, shape `(R,)`. None: one each.
    """

    def __init__(self, votes: Tensor, voters: Tensor | None = None, weight: Tensor | None = None):
        self.votes, self.voters, self.weight = votes, voters, weight

    def scores(self, alive: Tensor, class_weighted: bool, steps: int, everyone: bool = False) -> Tensor:
        """See `Graph`."""
        start = start_scores(alive, class_weighted, self.votes.dtype)
        if self.voters is not None:
            start = self._spoken(start, alive)
        return page_rank(self.votes, steps, start, None if everyone else alive)

    def _spoken(self, start: Tensor, alive: Tensor) -> Tensor:
        """What each voter gives, shape `(B, R)`: its own start times whom it speaks for; the sum as with all."""
        start = start.index_select(1, self.voters)
        if self.weight is not None:
            start = start * self.weight
        total = start.sum(-1, keepdim=True)
        start = torch.where(total > 0, start, torch.ones_like(start))  # every voter was removed: all of them again
        return start * (alive.sum(-1, keepdim=True) / start.sum(-1, keepdim=True))


def importance(
    graph: Graph,
    alive: Tensor,
    prefix: int,
    *,
    steps: int,
    class_weighted: bool,
    heads: str = "rms",
    bounds: tuple[float, float] | None = (0.01, 0.7),
    everyone: bool = False,
) -> Tensor:
    """The importance stage: WPR per head, VHF, EIR.

    Args:
        graph: of all N tokens.
        alive: bool, shape `(B, N)`.
        prefix: tokens before the patches.
        steps: of WPR.
        class_weighted: see `start_scores`.
        heads: see `combine_heads`.
        bounds: see `head_filter`. None: no head is dropped.
        everyone: all are alive.

    Returns:
        One score per patch, shape `(B, n)`; -inf where not alive.
    """
    scores = graph.scores(alive, class_weighted, steps, everyone)  # (B, H, N)
    weight = None if bounds is None else head_filter(scores, alive, prefix, bounds)
    combined = combine_heads(scores[:, :, prefix:], heads, weight)
    return combined.masked_fill(~alive[:, prefix:], -torch.inf)


def choose_tokens(
    graph: Graph,
    metric: Tensor | None,
    alive: Tensor,
    keep: int,
    prefix: int,
    *,
    steps: int = 5,
    class_weighted: bool = False,
    heads: str = "rms",
    bounds: tuple[float, float] | None = (0.01, 0.7),
    similarity_share: float = 0.3,
    split: str = "halves",
    everyone: bool = False,
    wants_target: bool = False,
) -> Choice:
    """A pruning layer, I' -> S -> I.

    - I': one vote on all tokens, for the ranks only. (Many alike background tokens vote for each other; S has to thin
      them out before they may decide anything.)
    - S: r = round(share (n - keep)) redundant patches go, n -> n - r.
    - I: WPR from the start again among the survivors, with rows normalised over them; the best `keep` stay.

    Args:
        graph: of all N tokens.
        metric: `unit_keys` of the n patches, shape `(B, n, c)`; needed for S and for targets.
        alive: bool, shape `(B, N)`, False for padding.
        keep: patches that stay, 1 to n.
        prefix: tokens before the patches: they vote and get votes, and always stay.
        similarity_share: how much of what goes is removed by S, 0 to 1. 0 leaves S and I' out. S removes at most
            n // 2.
        split: see `redundant`.
        everyone: `alive` is True everywhere: there is no padding.
        wants_target: whether removed patches get the kept one that is most similar.
        steps, class_weighted, heads, bounds: see `importance`.

    Returns:
        The choice, `kept` of shape `(B, keep)`.

    Raises:
        GenpruneError: `keep` is out of range.
    """
    patches = alive.shape[1] - prefix
    check_count(keep, patches)
    settings = {"class_weighted": class_weighted, "heads": heads, "bounds": bounds}
    padding = ~alive[:, prefix:]
    if keep == patches:
        kept = torch.arange(patches, device=alive.device).expand(alive.shape[0], patches)
        return Choice(kept, kept if wants_target else None)
    gone = min(round(similarity_share * (patches - keep)), patches // 2)
    if gone:
        ranks = importance(graph, alive, prefix, steps=1, everyone=everyone, **settings)
        removed = redundant(metric, ranks, gone, ~padding, split)
        alive = alive.scatter(1, removed + prefix, False)
    if patches - gone == keep:  # S has done it all
        kept = complement(removed, patches)
    else:
        scores = importance(graph, alive, prefix, steps=steps, everyone=everyone and not gone, **settings)
        kept = best_patches(scores, keep)
    return Choice(kept, nearest_kept(metric, kept, padding) if wants_target else None)


def best_patches(scores: Tensor, keep: int) -> Tensor:
    """SORTED indices of the `keep` highest scores (B, n): the order of a sequence has a meaning to what comes next."""
    return scores.topk(keep, dim=1).indices.sort(dim=1).values


def steps_at(steps: int | tuple[int, int, int], layer: int, depth: int) -> int:
    """WPR steps of a layer: of the first quarter, the middle half or the last quarter of the depth."""
    if isinstance(steps, int):
        return steps
    return steps[0] if 4 * layer < depth else steps[1] if 4 * layer < 3 * depth else steps[2]
