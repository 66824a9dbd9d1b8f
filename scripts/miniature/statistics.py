"""Distances between sets of feature vectors and of pictures, float64, for the miniature's own report.

The package's `genprune.metrics` has the general versions; these few lines keep the training script self-contained.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Fréchet distance of Gaussians fitted to features `(N, D)` and `(M, D)` (Heusel et al., arXiv 1706.08500).

    The trace of the root of the product of covariances is the sum of roots of its eigenvalues, all real and >= 0.
    """
    product = np.cov(x, rowvar=False) @ np.cov(y, rowvar=False)
    roots = np.sqrt(np.clip(np.linalg.eigvals(product).real, 0, None)).sum()
    difference = x.mean(0) - y.mean(0)
    return float(difference @ difference + x.var(0, ddof=1).sum() + y.var(0, ddof=1).sum() - 2 * roots)


def kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD with the cubic kernel (x.y / D + 1)^3 (KID, arXiv 1801.01401), over all of both sets."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    xx, yy = kernel(x, x), kernel(y, y)
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within - 2 * kernel(x, y).mean())


def bootstrap_interval(values: np.ndarray, rounds: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of `values`, shape `(N,)`, by resampling."""
    rng = np.random.default_rng(seed)
    means = rng.choice(values, (rounds, len(values))).mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def smallest_difference(values: np.ndarray) -> float:
    """Difference of two independent means at this N that is found in 80 % of trials at the 5 % level."""
    return float((1.96 + 0.84) * np.sqrt(2 * values.var() / len(values)))


def nearest_pictures(queries: Tensor, pool: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """RMS pixel distances of uint8 pictures `(N, 3, H, W)` to the nearest and second nearest of `(M, 3, H, W)`.

    Returns:
        nearest `(N,)`, second nearest `(N,)`, both in levels of 255, and the nearest's number in the pool `(N,)`.
    """
    flat = queries.flatten(1).float()
    best = torch.full((len(queries), 0), float("inf"))
    index = torch.empty((len(queries), 0), dtype=torch.long)
    for start in range(0, len(pool), 2048):
        part = pool[start : start + 2048].flatten(1).float()
        squared = flat.square().sum(1)[:, None] + part.square().sum(1)[None] - 2 * flat @ part.T
        best = torch.cat([best, squared], 1)
        index = torch.cat([index, torch.arange(start, start + len(part)).expand(len(queries), -1)], 1)
        best, order = best.topk(2, dim=1, largest=False)
        index = index.gather(1, order)
    distances = (best.clamp(min=0) / flat.shape[1]).sqrt().numpy()
    return distances[:, 0], distances[:, 1], index[:, 0].numpy()
