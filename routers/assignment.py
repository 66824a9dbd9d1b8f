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
    """The interval of each noise level, ascending from clean; int64 of shape `(n,)`. A boundary is of the noisier."""
    levels, bounds = (torch.tensor(each, dtype=torch.float64) for each in (levels, boundaries))
    return torch.bucketize(levels, bounds, right=True)


@torch.no_grad()
def cluster_codes(space: ArchitectureSpace, logits: Tensor, count: int, rounds: int = 20) -> Tensor:
    """`count` codes in the midst of predicted ones: spherical k-means in phi, from points that lie far apart.

    Means, because single predictions that lie far out are architectures that hardly anything is left of.

    Args:
        logits: shape `(n, D)`, n >= count.

    Returns:
        Logits `(count, D)`.
    """
    features = space.features(logits)
    seeds = [int((features @ features.mean(0)).argmax())]
    nearest = features @ features[seeds[0]]
    while len(seeds) < count:
        nearest[seeds] = float("inf")
        seeds.append(int(nearest.argmin()))
        nearest = torch.minimum(nearest, features @ features[seeds[-1]])
    codes = logits[seeds]
    for _ in range(rounds):
        chosen = (features @ space.features(codes).t()).argmax(1)
        means = [logits[chosen == k].mean(0) if (chosen == k).any() else codes[k] for k in range(count)]
        codes = torch.stack(means)
    return codes


@torch.no_grad()
def balancing_bias(similarity: Tensor, weights: Tensor, rounds: int = 400) -> Tensor:
    """What to add to each code's similarity so that the best code of each prompt gives every code its share.

    The potentials of the balanced transport over the training prompts: they are constants, so that a prompt's route
    still depends on nothing but the prompt. Without them codes that training kept busy by its balance can end up with
    hardly a prompt.

    Args:
        similarity: of the distinct training prompts, shape `(n, K)`.
        weights: how often each prompt occurs, shape `(n,)`.
        rounds: of the subgradient steps, the last of them small.

    Returns:
        Float64 of shape `(K,)`, mean 0.
    """
    prompts, codes = similarity.shape
    share = weights.double() / weights.double().sum()
    bias, best = torch.zeros(codes, dtype=torch.float64), None
    rate = 4 * float(similarity.double().std(1).mean()) if codes > 1 else 0.0
    for step in range(rounds if codes > 1 else 0):
        chosen = (similarity.double() + bias).argmax(1)
        usage = torch.zeros(codes, dtype=torch.float64).index_add_(0, chosen, share)
        miss = float((usage - 1 / codes).abs().sum())
        if best is None or miss < best[0]:
            best = miss, bias.clone()
        bias = bias - rate * (1 - step / rounds) * (usage - 1 / codes)
    bias = bias if best is None else best[1]
    return bias - bias.mean()
