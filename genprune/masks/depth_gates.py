"""Which layers of each group stay, a categorical over all ways to choose: draws with gradients, and the decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from genprune.masks.depth_groups import DepthGroup


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel noise from uniform noise in [0, 1): `-log(-log(u))`, kept away from both ends."""
    tiny = torch.finfo(uniform.dtype).tiny
    return -torch.log(-torch.log(uniform.clamp(min=tiny, max=1 - torch.finfo(uniform.dtype).eps)))


def straight_through_choice(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """One way per row, drawn; one-hot forward, the softmax's gradient backward.

        p = softmax((logits + g) / tau),   y = onehot(argmax p) + p - stop_gradient(p)

    Args:
        logits: shape `(choices,)`, scaled.
        noise: Gumbel noise of shape `(rows, choices)`.
        temperature: tau > 0. It shapes the gradient; the draw does not depend on it.

    Returns:
        Shape `(rows, choices)`, exactly 0 and 1.

    Reference:
        Straight-through Gumbel-softmax (Jang et al., arXiv 1611.01144), as in TinyFusion (arXiv 2412.01199).
    """
    soft = ((logits + noise) / temperature).softmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    # p - stop_gradient(p) is 0 to the bit, so that the sum is exactly one-hot
    return hard + (soft - soft.detach())


def drawn_gates(
    groups: Sequence[DepthGroup],
    logits: Sequence[Tensor],
    rows: int,
    *,
    scale: float,
    temperature: float,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """A draw for every row of a batch: site name -> gate of shape `(rows, 1)`, 0 or 1, with gradients by the logits.

    Args:
        logits: one tensor `(choices,)` for each group.
        scale: what logits are multiplied by.
        generator: on the CPU, so that a seed gives the same draw on every device.
    """
    gates = {}
    for group, values in zip(groups, logits):
        noise = gumbel(torch.rand(rows, len(values), generator=generator)).to(values.device)
        chosen = straight_through_choice(values * scale, noise, temperature)  # (rows, choices)
        kept = chosen @ group.masks.to(values)  # (rows, layers)
        gates |= {name: kept[:, index : index + 1] for index, name in enumerate(group.layers)}
    return gates


def probabilities(group: DepthGroup, logits: Tensor, scale: float) -> dict[str, float]:
    """How likely each layer of a group is to be kept by a draw: site name -> [0, 1]."""
    kept = (logits.double() * scale).softmax(-1) @ group.masks.double()
    return dict(zip(group.layers, kept.clamp(0, 1).tolist()))


def decided(group: DepthGroup, logits: Tensor) -> tuple[str, ...]:
    """The layers of the most likely way, in order; exactly `kept`. Ties go to the earlier layers."""
    mask = group.masks[int(logits.argmax())]
    return tuple(name for name, stays in zip(group.layers, mask.tolist()) if stays)


def most_likely(group: DepthGroup, values: Mapping[str, float]) -> tuple[str, ...]:
    """The `kept` layers of the highest values, in order: for a number that was not learned. Ties as in `decided`."""
    best = sorted(group.layers, key=lambda name: -values[name])[: group.kept]
    return tuple(name for name in group.layers if name in best)
