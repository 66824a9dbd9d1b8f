"""The distance of two features on a scale that is the same for every tap: the normalisers of distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

WINDOW = 100  # steps that a running mean looks back over, once there are as many
_TINY = 1e-30


def mean_square(features: Sequence[Tensor]) -> Tensor:
    """Mean square over all elements of all streams of one tap, a scalar in float32 or wider."""
    return sum(_wide(each).square().sum() for each in features) / sum(each.numel() for each in features)


def raw_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared error over all elements of all streams of one tap."""
    return mean_square([_wide(ours) - _wide(theirs) for ours, theirs in zip(student, teacher)])


def layer_norm_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """`|LN(f^S) - LN(f^T)|^2`, mean over elements: layer norm without weights over the channels of each position."""
    return raw_distance([_layer_normed(each) for each in student], [_layer_normed(each) for each in teacher])


def masked_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """`|m_S f^S - m_T f^T|^2`, mean over elements, with `m = |f - mean| < 2 std` of each sample, each side its own.

    Reference:
        TinyFusion (arXiv 2412.01199): a few huge activations carry most of a transformer's squared error.
    """
    return raw_distance([_without_outliers(each) for each in student], [_without_outliers(each) for each in teacher])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def _layer_normed(feature: Tensor) -> Tensor:
    """Over channels: dim 1 of a map `(B, C, h, w)`, the last of tokens `(B, N, C)`."""
    last = _wide(feature).movedim(1, -1) if feature.ndim == 4 else _wide(feature)
    return functional.layer_norm(last, last.shape[-1:])


def _without_outliers(feature: Tensor) -> Tensor:
    flat = _wide(feature).flatten(1)
    with torch.no_grad():
        mask = (flat - flat.mean(1, keepdim=True)).abs() < 2 * flat.std(1, keepdim=True)
    return flat * mask


DISTANCES = {"layernorm": layer_norm_distance, "masked": masked_distance}


@dataclass
class RunningScales:
    """The running mean of each tap's teacher energy, `mean |f_l^T|^2`, and the weights a_l that follow.

    The weights of a step are fixed before it and updated after, so that they do not depend on how its rows are split
    into micro-batches and processes.

    Args:
        normalizer: one of `NORMALIZERS`.
        energies: mean square of each tap; empty before the first look.
        count: steps seen.
    """

    normalizer: str
    energies: list[float] = field(default_factory=list)
    count: int = 0

    @property
    def needed(self) -> bool:
        """Whether the weights depend on energies at all."""
        return self.normalizer in ("rel_l2", "first_ref")

    def update(self, energies: Sequence[float]) -> None:
        """Take in the energies of one step."""
        self.count += 1
        if not self.energies:
            self.energies = list(energies)
            return
        share = 1 / min(self.count, WINDOW)
        self.energies = [mean + share * (new - mean) for mean, new in zip(self.energies, energies)]

    def weights(self, taps: int) -> list[float]:
        """a_l of each tap: `rel_l2` 1 / E_l, `first_ref` E_1 / E_l, otherwise 1."""
        if not self.needed:
            return [1.0] * taps
        scale = 1.0 if self.normalizer == "rel_l2" else self.energies[0]
        return [scale / max(energy, _TINY) for energy in self.energies]

    def to_json(self) -> dict:
        return {"energies": self.energies, "count": self.count}
