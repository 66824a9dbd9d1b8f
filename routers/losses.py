"""The terms that shape codes and predictor, beside the denoiser's own losses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

RESOURCE_LOSSES = ("log", "absolute", "squared")


def contrastive_loss(features: Tensor, embeddings: Tensor, temperature: float = 0.03) -> Tensor:
    """Prompts that are close shall get codes that are close.

        P = softmax(cos(phi_i, phi_j) / tau),  Q = softmax(cos(z_i, z_j) / tau),  mean element-wise BCE(P, Q)

    Args:
        features: phi of predicted codes, shape `(B, D)`, normalised.
        embeddings: of the prompts, shape `(B, dim)`.
        temperature: tau > 0.

    Reference:
        APTP (arXiv 2406.12042), section 3. No InfoNCE: the diagonal takes part.
    """
    embeddings = functional.normalize(embeddings.to(features.dtype), dim=-1)
    predicted = torch.softmax(features @ features.t() / temperature, -1)
    wanted = torch.softmax(embeddings @ embeddings.t() / temperature, -1)
    return functional.binary_cross_entropy(predicted.clamp(1e-12, 1 - 1e-12), wanted)


def resource_loss(kept: Tensor, target: float, form: str = "log") -> Tensor:
    """How far the mean budget of a batch is from its target.

    Args:
        kept: share of what can go that stays, for each prompt, shape `(B,)`.
        target: the same share that shall stay.
        form: `log`: |log(mean / target)|; `absolute` or `squared` difference.
    """
    mean = kept.mean()
    if form == "log":
        return torch.log(mean.clamp_min(1e-6) / target).abs()
    return (mean - target).abs() if form == "absolute" else (mean - target).square()


def spread_terms(kept: Tensor) -> tuple[Tensor, Tensor]:
    """`(-std, 1 - max)` of the codes' budgets, shape `(K,)`: which fall as codes differ and one is near whole."""
    spread = kept.std(unbiased=False) if kept.numel() > 1 else kept.sum() * 0
    return -spread, 1 - kept.max()


def commitment_loss(features: Tensor, codes: Tensor) -> Tensor:
    """1 - cos(phi(e), phi(a)) of prompts and the codes that they were given, both `(B, D)`; the codes are constants.

    Without it the predictor learns from the contrastive term alone, as in APTP.
    """
    return 1 - (features * codes.detach()).sum(-1).mean()
