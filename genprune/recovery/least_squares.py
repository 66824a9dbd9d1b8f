"""The closed-form update of a layer that has lost inputs; matrices in float64, no model."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Residual:
    """What a layer's output lacks, r, beside what the layer still reads, x; expectations over positions.

    Attributes:
        second: `E[x x^T]`, shape `(K, K)`.
        cross: `E[r x^T]`, shape `(out, K)`.
        mean: `E[x]`, shape `(K,)`.
        lack: `E[r]`, shape `(out,)`.
        energy: `E ||r||^2`.
    """

    second: Tensor = field(repr=False)
    cross: Tensor = field(repr=False)
    mean: Tensor = field(repr=False)
    lack: Tensor = field(repr=False)
    energy: float

    @classmethod
    def of_removed(cls, weight: Tensor, second: Tensor, mean: Tensor, kept: Tensor) -> Residual:
        """`r = W_R x_R`, for the removed features R of one and the same input.

        Args:
            weight: `W`, shape `(out, features)`.
            second, mean: of all features.
            kept: bool, shape `(features,)`.
        """
        gone = weight[:, ~kept]  # (out, R)
        energy = ((gone @ second[~kept][:, ~kept]) * gone).sum()
        return cls(
            second=second[kept][:, kept],
            cross=gone @ second[~kept][:, kept],
            mean=mean[kept],
            lack=gone @ mean[~kept],
            energy=float(energy),
        )


@dataclass(frozen=True)
class Update:
    """What is added to the kept columns of a weight, `(out, K)`, and to the bias, `(out,)`; the error that is left."""

    weight: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)
    error: float


def least_squares(residual: Residual, damping: float, with_bias: bool) -> Update:
    """The change of weight and bias that makes up for r as well as a linear layer of x can.

        D = C (H + l I)^-1,   l = damping * mean(diag H)

    minimises `E ||r - D x||^2 + l ||D||^2`: the damping holds the weights where they were, so that nothing removed is
    nothing changed, and features that carry the same do not cancel each other with large weights. With a bias, H and
    C are about the means and `d = E[r] - D E[x]`, which is the constant feature 1 without damping on it.
    """
    second, cross = residual.second, residual.cross
    if with_bias:
        second = second - torch.outer(residual.mean, residual.mean)
        cross = cross - torch.outer(residual.lack, residual.mean)
    change = _solved(second, cross, damping)
    bias = residual.lack - change @ residual.mean if with_bias else torch.zeros_like(residual.lack)
    gained = 2 * (change * cross).sum() - ((change @ second) * change).sum()
    if with_bias:
        gained = gained + residual.lack.square().sum()
    return Update(change, bias, max(residual.energy - float(gained), 0.0))


def mean_only(residual: Residual) -> Update:
    """FLAP's compensation: the bias takes over the mean, `d = E[r]`; weights stay."""
    gained = float(residual.lack.square().sum())
    return Update(torch.zeros_like(residual.cross), residual.lack, max(residual.energy - gained, 0.0))


def _solved(second: Tensor, cross: Tensor, damping: float) -> Tensor:
    """`cross (second + damping * mean(diag) I)^-1`, with more damping where that is not positive definite."""
    scale = second.diagonal().mean() if len(second) else second.new_zeros(())
    if not scale > 0:  # nothing is kept, or what is kept is constant
        return torch.zeros_like(cross)
    while True:
        damped = second.clone()
        damped.diagonal().add_(damping * scale)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return torch.cholesky_solve(cross.T, factor).T
        raised = max(10 * damping, 1e-10)
        logger.warning(
            "a Gram matrix of %d features is singular: damping %g instead of %g", len(second), raised, damping
        )
        damping = raised
