"""Optimal transport of a batch of prompts to codes, so that in training every code gets its share."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def sinkhorn_assignment(similarity: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """The code of each prompt under a balanced plan.

        Q = exp(S / epsilon)^T, then in turns: rows to 1 / K, columns to 1 / B; argmax over codes

    Args:
        similarity: cosines, shape `(B, K)`; of the whole batch of all processes.
        epsilon: > 0; small follows the similarity more, large balances more in few iterations.
        iterations: >= 1.

    Returns:
        int64 of shape `(B,)`.

    Reference:
        Cuturi (arXiv 1306.0895); APTP (arXiv 2406.12042), section 3: epsilon .05 and 3 iterations.
    """
    scaled = similarity.double() / epsilon
    transport = torch.exp(scaled - scaled.max()).t()  # (K, B); the maximum off, or a small epsilon overflows
    codes, prompts = transport.shape
    transport = transport / transport.sum()
    for _ in range(iterations):
        transport = transport / transport.sum(1, keepdim=True).clamp_min(1e-300) / codes
        transport = transport / transport.sum(0, keepdim=True).clamp_min(1e-300) / prompts
    return transport.argmax(0)
