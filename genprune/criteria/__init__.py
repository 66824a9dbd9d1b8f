"""Criteria: one file each. A criterion gives every unit of every site a score, higher = keep.

Each is a small frozen dataclass, registered here by name, with
- `needs`: what it reads, a subset of `weights`, `gradients` (calibration data and a backward pass) and
  `activations` (calibration data);
- `additive`: whether scores of units add up, so that an allocation ranks them per cost; otherwise they are ranks;
- `scores(model, sites, calibration)`: site name -> float tensor of shape `(size,)`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from genprune.errors import GenpruneError, nearest
from genprune.sites import Sites


class Criterion(Protocol):
    """What an allocation needs to know of a criterion."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    additive: ClassVar[bool]
    summary: ClassVar[str]

    def scores(self, model: nn.Module, sites: Sites, calibration=None) -> dict[str, Tensor]: ...


# Name -> (module of this package, class).
_CRITERIA = {
    "random": ("random", "RandomScores"),
    "magnitude": ("magnitude", "MagnitudeScores"),
    "taylor": ("taylor", "TaylorScores"),
    "obs": ("obs", "OBSScores"),
}


def criteria() -> tuple[str, ...]:
    """Names of the criteria."""
    return tuple(_CRITERIA)


def criterion_named(name: str) -> type[Criterion]:
    """The class of a criterion. Raises `GenpruneError` for an unknown name."""
    if name not in _CRITERIA:
        raise GenpruneError(
            f"no criterion '{name}'{nearest(name, _CRITERIA)}; expected one of {', '.join(_CRITERIA)}."
        )
    module, cls = _CRITERIA[name]
    return getattr(importlib.import_module(f"genprune.criteria.{module}"), cls)


def checked_scores(scores: Mapping[str, Tensor], sites: Sites, criterion: str) -> dict[str, Tensor]:
    """The scores as float32 on the CPU, in site order.

    Raises:
        GenpruneError: a score is not finite, or a site has none or the wrong number.
    """
    checked = {}
    for name, site in sites.items():
        values = scores[name].detach().to("cpu", torch.float32)
        if values.shape != (site.size,):
            raise GenpruneError(f"'{criterion}' scored '{name}' as {tuple(values.shape)}; expected ({site.size},).")
        if not torch.isfinite(values).all():
            bad = int((~torch.isfinite(values)).sum())
            raise GenpruneError(
                f"'{criterion}' gave {bad} of {site.size} units of '{name}' a score that is NaN or infinite; expected "
                "finite scores. Check the model's weights, and score in float32 or bfloat16 rather than float16."
            )
        checked[name] = values
    return checked
