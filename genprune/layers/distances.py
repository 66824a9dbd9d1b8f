"""How far an output is from the dense one, one value for each row: what a layer's absence is judged by."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from genprune.errors import GenpruneError, nearest

Distance = Callable[[Tensor, Tensor], Tensor]


def squared_error(output: Tensor, dense: Tensor) -> Tensor:
    """`||y - y0||^2 / n` of each row, shape `(rows,)`: the output loss of LAPTOP-Diff, per element.

    Args:
        output, dense: shape `(rows, ...)`, float32 or wider.
    """
    return (output - dense).square().flatten(1).mean(1)


def relative_norm(output: Tensor, dense: Tensor) -> Tensor:
    """`||y - y0|| / ||y0||` of each row, shape `(rows,)`."""
    rows = dense.flatten(1)
    return (output.flatten(1) - rows).norm(dim=1) / rows.norm(dim=1).clamp_min(torch.finfo(rows.dtype).tiny)


def angular(output: Tensor, dense: Tensor) -> Tensor:
    """`arccos(<y, y0> / (||y|| ||y0||)) / pi` of each row, shape `(rows,)`, in [0, 1].

    Reference:
        FinerCut (arXiv 2405.18218).
    """
    unit = torch.nn.functional.normalize(output.flatten(1), dim=1)
    dense_unit = torch.nn.functional.normalize(dense.flatten(1), dim=1)
    # 2 atan2(|u - v|, |u + v|): arccos loses half of its digits where the two nearly agree
    return 2 * torch.atan2((unit - dense_unit).norm(dim=1), (unit + dense_unit).norm(dim=1)) / math.pi


def jensen_shannon(output: Tensor, dense: Tensor) -> Tensor:
    """Jensen-Shannon divergence of the softmax of logits `(rows, classes)`, in nats, shape `(rows,)`, in [0, ln 2].

    Raises:
        GenpruneError: the outputs are no logits.

    Reference:
        FinerCut (arXiv 2405.18218).
    """
    if dense.ndim != 2:
        raise GenpruneError(
            f"distance='js' compares probabilities of classes, and the model returns {tuple(dense.shape)}; expected "
            "logits (rows, classes). Pass distance='angular' or 'l2'."
        )
    logs = output.log_softmax(1), dense.log_softmax(1)
    mean = torch.logaddexp(*logs) - math.log(2)
    return sum((log.exp() * (log - mean)).sum(1) for log in logs) / 2


DISTANCES: dict[str, Distance] = {
    "output_mse": squared_error,
    "l2": relative_norm,
    "angular": angular,
    "js": jensen_shannon,
}


def distance_named(name: str) -> Distance:
    """A distance by its name. Raises `GenpruneError`."""
    if name not in DISTANCES:
        raise GenpruneError(
            f"no distance '{name}'{nearest(str(name), DISTANCES)}; expected one of {', '.join(DISTANCES)}."
        )
    return DISTANCES[name]
