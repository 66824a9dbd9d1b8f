"""Which code each row of a training batch gets: by its prompt under optimal transport, or by its noise level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genprune.routers.architecture import ArchitectureSpace
from genprune.routers.settings import APTP
from genprune.routers.sinkhorn import sinkhorn_assignment


def similarities(space: ArchitectureSpace, logits: Tensor, codes: Tensor) -> Tensor:
    """S_ik = cos(phi(e_i), phi(a_k)), float64 of shape `(n, K)`."""
    return space.features(logits) @ space.features(codes).t()


@torch.no_grad()
def balanced(
    space: ArchitectureSpace, logits: Tensor, codes: Tensor, settings: APTP, accelerator: Any
) -> tuple[Tensor, Tensor]:
    """The code of this process's rows, balanced over the rows of all processes, and the similarities `(B, K)`."""
    own = similarities(space, logits, codes)
    everyone = accelerator.gather(own)
    chosen = sinkhorn_assignment(everyone, settings.sinkhorn_epsilon, settings.sinkhorn_iterations)
    first = accelerator.process_index * len(own)
    return chosen[first : first + len(own)], own


def by_noise_level(levels: Sequence[float], boundaries: Sequence[float]) -> Tensor:
    """The interval of each noise level, ascending from clean; int64 of shape `(n,)`."""
    return torch.bucketize(torch.tensor(levels, dtype=torch.float64), torch.tensor(boundaries, dtype=torch.float64))


@torch.no_grad()
def far_apart(space: ArchitectureSpace, logits: Tensor, count: int) -> Tensor:
    """Indices of `count` codes that lie far from each other: farthest points in phi, the first nearest to the mean.

    Args:
        logits: shape `(n, D)`, n >= count.
    """
    features = space.features(logits)
    mean = features.mean(0)
    chosen = [int((features @ mean).argmax())]
    nearest = features @ features[chosen[0]]
    while len(chosen) < count:
        nearest[chosen] = float("inf")
        chosen.append(int(nearest.argmin()))
        nearest = torch.minimum(nearest, features @ features[chosen[-1]])
    return torch.tensor(chosen)
