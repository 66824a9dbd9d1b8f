"""From the logits of an architecture code to its gates: Gumbel-sigmoid widths and an ordered depth (APTP).

    width:  m = sigmoid((logit + G + b) / T)
    depth:  p = flip(cumsum(softmax(logits))),   m = sigmoid((log(p / (1 - p)) + G + b) / T)

with one Gumbel(0, 1) draw G, the temperature T and the offset b. A gate is hard, `1[m >= 1/2]`, and its gradient that
of m (straight through), in training as in use: no soft mask has to become a hard one at the end. Where nothing is to
be drawn, G is its median.

Reference:
    APTP (arXiv 2406.12042, section 3); the release's constants.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MEDIAN_NOISE = -math.log(math.log(2))  # of a Gumbel(0, 1) draw: .3665
_GUARD = 1e-6


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Gumbel(0, 1) draws on the CPU, float32: `-log(-log U)`."""
    uniform = torch.rand(shape, generator=generator).clamp_(1e-7, 1 - 1e-7)
    return -torch.log(-torch.log(uniform))


def threshold(offset: float) -> float:
    """The logit whose gate is kept half of the time: `-b - .3665`."""
    return -offset - MEDIAN_NOISE


def depth_logits(logits: Tensor) -> Tensor:
    """log(p / (1 - p)) of the ordered keep-probabilities `p = flip(cumsum(softmax(logits)))`, shape as given.

    p falls along the last dimension and starts at 1: the first never goes.
    """
    probability = torch.softmax(logits, -1).cumsum(-1).flip(-1).clamp(_GUARD, 1 - _GUARD)
    return torch.log(probability) - torch.log1p(-probability)


def relaxed(logits: Tensor, noise: Tensor | float, temperature: float, offset: float) -> Tensor:
    """m of the formula above, in (0, 1); depth logits go through `depth_logits` first."""
    return torch.sigmoid((logits + noise + offset) / temperature)


def straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """`hard`, to the bit, with the gradient of `soft`."""
    return hard.detach() + (soft - soft.detach())
