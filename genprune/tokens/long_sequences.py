"""Scores without the N x N map, for sequences where it would not fit or would cost more than the pruning saves.

At 4,096 tokens and 10 heads one float32 map is 640 MiB. Three ways around it, with the interface of
`pagerank.DenseGraph`: a few tokens vote for all (`landmark_graph`), the class token votes alone (`class_graph`), or
all vote, a block of rows at a time (`BlockedGraph`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from genprune.tokens.pagerank import DenseGraph, page_rank, start_scores, vote_weights

BLOCK = 256  # voters at a time


class BlockedGraph:
    """Every token votes, `BLOCK` rows of the map at a time: the memory of `(B, H, BLOCK, N)`.

    Costs one q k^T and one exp for every step of WPR, about an attention call each: meant for one or two votes.

    Args:
        q, k: shape `(B, H, N, d)`.
        scale: of `q k^T`.
        bias: broadcastable to `(B, H, N, N)`.
        temperature: see `pagerank.vote_weights`.
    """

    def __init__(self, q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None, temperature: float = 1.0):
        self.q, self.k, self.scale, self.bias, self.temperature = q, k, scale, bias, temperature

    def scores(self, alive: Tensor, class_weighted: bool, steps: int, everyone: bool = False) -> Tensor:
        """See `pagerank.Graph`."""
        scores = start_scores(alive, class_weighted, torch.promote_types(self.q.dtype, torch.float32))[:, None]
        for _ in range(steps):
            scores = self._passed(scores, None if everyone else alive)  # (B, H, N)
        return scores

    def _passed(self, scores: Tensor, alive: Tensor | None) -> Tensor:
        """One update for scores of shape `(B, 1, N)` or `(B, H, N)`."""
        received = 0
        for first in range(0, self.q.shape[2], BLOCK):
            rows = slice(first, min(first + BLOCK, self.q.shape[2]))
            bias = self.bias
            if bias is not None and bias.shape[-2] != 1:
                bias = bias[..., rows, :]
            votes = vote_weights(self.q[:, :, rows], self.k, self.scale, bias, self.temperature)
            received = received + page_rank(votes, 1, scores[..., rows], alive)
        return received


def voters_graph(
    q: Tensor,
    k: Tensor,
    voters: Tensor,
    scale: float,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    weight: Tensor | None = None,
) -> DenseGraph:
    """The rows of the attention map of some tokens, shape `(B, H, R, N)`.

    Args:
        voters: which tokens vote, shape `(R,)`.
        weight: how many tokens each speaks for, shape `(R,)`.
    """
    if bias is not None and bias.shape[-2] != 1:
        bias = bias.index_select(-2, voters)
    return DenseGraph(vote_weights(q.index_select(2, voters), k, scale, bias, temperature), voters, weight)


def landmark_graph(
    q: Tensor,
    k: Tensor,
    landmarks: int,
    prefix: int,
    class_token: bool,
    scale: float,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> DenseGraph:
    """An estimate of the vote of all: evenly spaced patches vote, each for the n / m it stands for.

    Args:
        q, k: shape `(B, H, N, d)`.
        landmarks: m, the patches that vote.
        prefix: tokens before the patches.
        class_token: whether the prefix votes too, each token for itself.

    Returns:
        A graph of m (+ prefix) rows: O(m N d) instead of O(N^2 d). For one step of WPR.
    """
    patches = q.shape[2] - prefix
    count = min(landmarks, patches)
    index = torch.arange(count, device=q.device)
    voters = prefix + (2 * index + 1) * patches // (2 * count)  # the middles of m equal stretches
    weight = torch.full((count,), patches / count, device=q.device)
    if class_token:
        voters = torch.cat([torch.arange(prefix, device=q.device), voters])
        weight = torch.cat([torch.ones(prefix, device=q.device), weight])
    return voters_graph(q, k, voters, scale, bias, temperature, weight)


def class_graph(
    q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None, temperature: float = 1.0
) -> DenseGraph:
    """The class token votes alone: its row of the attention map, O(N d)."""
    return voters_graph(q, k, torch.zeros(1, dtype=torch.int64, device=q.device), scale, bias, temperature)


def random_scores(rows: int, patches: int, seed: int, layer: int, device: torch.device) -> Tensor:
    """Scores that depend on (seed, layer, row, patch) and nothing else, float32 of shape `(rows, patches)`.

    An integer hash of the position (two rounds of multiply and xor-shift), and so the same numbers in eager mode,
    compiled, on every device, and on every call: no generator has a state that could drift.
    """
    key = _mixed(_mixed(seed & 0xFFFFFFFF) ^ (layer + 1))
    position = torch.arange(rows, device=device)[:, None] * 0x9E3779B1 + torch.arange(patches, device=device)
    return (_mixed((position & 0xFFFFFFFF) ^ key) >> 8).to(torch.float32)  # 24 bits, exact in float32


def _mixed(x):
    """A bijection of 32-bit integers with good avalanche, on an int or an int64 tensor."""
    x = ((x >> 16) ^ x) * 0x7FEB352D & 0xFFFFFFFF
    x = ((x >> 15) ^ x) * 0x846CA68B & 0xFFFFFFFF
    return (x >> 16) ^ x
