"""The real-vs-real floor: what a set distance says when there is no difference to find."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genprune.metrics.errors import BadImages
from genprune.metrics.result import Floor


def real_floor(
    features: Tensor,
    distance: Callable[[Tensor, Tensor], Tensor],
    size: int | None = None,
    splits: int = 5,
    seed: int = 0,
) -> Floor:
    """A set distance between disjoint random parts of the real images.

    A Frechet distance has a large floor at small numbers (it falls about as 1 / size), a kernel distance one around 0.
    A candidate at N images a side is to be read against the floor at `size = N`; with fewer than 2 N real images the
    halves are smaller than N and the floor of a Frechet distance comes out too high, never too low.

    Args:
        features: of real images, shape `(M, D)`, M >= 4.
        distance: e.g. `frechet_distance`, `kernel_distance`, `cmmd_distance`.
        size: images a part; default and maximum: half of them.
        splits: how many random splits, >= 2.
        seed: of the splits; the global random state is left alone.

    Raises:
        BadImages: too few images for the size, or fewer than two splits.
    """
    half = len(features) // 2
    size = half if size is None else size
    if not 2 <= size <= half or splits < 2:
        raise BadImages(
            f"a floor of {splits} splits at {size} images a part needs at least 2 splits, 2 images a part and twice "
            f"as many real images; there are {len(features)}. Pass more real images or a smaller size."
        )
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(splits):
        order = torch.randperm(len(features), generator=generator)
        values.append(float(distance(features[order[:size]], features[order[size : 2 * size]])))
    drawn = torch.tensor(values, dtype=torch.float64)
    return Floor(
        drawn.mean().item(), drawn.min().item(), drawn.max().item(), drawn.std().item(), size=size, splits=splits
    )
