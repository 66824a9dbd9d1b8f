"""`ArchitecturePredictor`: from a prompt's embedding to the logits of an architecture code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ArchitecturePredictor(nn.Module):
    """One linear layer for each vector of the architecture code, kept as one: `(n, dim)` -> `(n, D)` logits.

    Embeddings are centred and scaled by what the training prompts have, because captions of one kind share most of
    theirs. Weights are orthogonal vector by vector; biases start at 0 (`begin_at` moves them).

    Args:
        dim: width of the embeddings.
        lengths: of the code's vectors; they sum to D.
        scale: standard deviation of the first logits, for embeddings like the training prompts'.

    Reference:
        APTP (arXiv 2406.12042), architecture predictor: independent linear layers without a hidden one.
    """

    def __init__(self, dim: int, lengths: Sequence[int], seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, sum(lengths))
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))
        nn.init.zeros_(self.linear.bias)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for part in self.linear.weight.split(list(lengths)):
                nn.init.orthogonal_(part, gain=scale, generator=generator)

    @torch.no_grad()
    def standardise(self, embeddings: Tensor) -> None:
        """Take centre and scale from the training prompts' embeddings `(n, dim)`: entries get variance 1."""
        self.centre.copy_(embeddings.mean(0))
        spread = (embeddings - self.centre).square().mean().sqrt()
        self.scale.copy_(spread if float(spread) > 0 else torch.ones(()))

    @torch.no_grad()
    def begin_at(self, logits: Tensor) -> None:
        """Start around these logits, shape `(D,)`: the code of an average prompt."""
        self.linear.bias.copy_(logits)

    def standardised(self, embeddings: Tensor) -> Tensor:
        """Centred and scaled embeddings, shape as given."""
        return (embeddings - self.centre) / self.scale

    def forward(self, embeddings: Tensor) -> Tensor:
        """Logits `(n, D)` of embeddings `(n, dim)`."""
        return self.linear(self.standardised(embeddings))
