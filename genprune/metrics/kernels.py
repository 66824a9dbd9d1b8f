"""Sums of a kernel over pairs of feature rows, in blocks, so that memory stays small for any number of images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor], Tensor]  # (n, D), (m, D) -> (n, m)


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """KID's kernel `(x.y / D + 1)^3`, shape `(n, m)`."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_kernel(sigma: float) -> Kernel:
    """CMMD's kernel `exp(-|x - y|^2 / (2 sigma^2))`, shape `(n, m)`."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        squared = x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * x @ y.T  # (n, m)
        return torch.exp(-squared.clamp(min=0) / (2 * sigma**2))

    return kernel


def row_sums(kernel: Kernel, x: Tensor, y: Tensor, chunk: int = 1024) -> Tensor:
    """`sum_j k(x_i, y_j)` for each i, shape `(n,)`, in float64.

    Args:
        kernel: from rows to a matrix.
        x, y: features, shapes `(n, D)` and `(m, D)`.
        chunk: rows of x a block; memory is `chunk * m` doubles.
    """
    x, y = x.double(), y.double()
    return torch.cat([kernel(rows, y).sum(1) for rows in x.split(chunk)])


def self_sums(kernel: Kernel, x: Tensor, chunk: int = 1024) -> Tensor:
    """`sum_{j != i} k(x_i, x_j)` for each i, shape `(n,)`, in float64."""
    x = x.double()
    diagonal = torch.cat([kernel(row[None], row[None]).reshape(1) for row in x])
    return row_sums(kernel, x, x, chunk) - diagonal
