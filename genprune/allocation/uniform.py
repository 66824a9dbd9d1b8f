"""Uniform allocation: every site keeps the same share of its units, to within one unit."""

from __future__ import annotations

import torch
from torch import Tensor

from genprune.allocation.steps import Steps


def uniform_order(steps: Steps, additive: bool) -> Tensor:
    """Sort key of each step, ascending = goes first: the share of its site that is gone in the middle of the step.

    Sites of one unit cannot lose a share: those of one kind together count as one site, ranked by score per unit cost
    (or by score where scores are ranks).
    """
    key = steps.share.clone()
    ranked = steps.score / (steps.cost.clamp(min=1) if additive else steps.units)
    by_kind: dict[str, list[int]] = {}
    for index, column in enumerate(steps.column.tolist()):
        if steps.columns[column].size == 1:
            by_kind.setdefault(steps.columns[column].kind, []).append(index)
    for indices in by_kind.values():
        members = torch.tensor(indices)
        order = members[torch.sort(ranked[members], stable=True).indices]
        key[order] = (torch.arange(len(indices), dtype=key.dtype) + 0.5) / len(indices)
    return key
