"""Operators: cheaper modules that stand in a host module's place, registered by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from genprune.errors import GenpruneError, nearest
from genprune.operators.base import Operator, beside
from genprune.operators.dropped import DropResampler, DropSkip
from genprune.operators.linear import LinearMap
from genprune.operators.low_rank import LowRank
from genprune.operators.norms import AffineNorm
from genprune.operators.pointwise import IdentityOperator, ReLUOperator
from genprune.operators.pooled import PooledResampler
from genprune.operators.separable import SeparableConv

OPERATORS: dict[str, type[Operator]] = {
    cls.name: cls
    for cls in (
        LowRank,
        SeparableConv,
        PooledResampler,
        IdentityOperator,
        ReLUOperator,
        AffineNorm,
        LinearMap,
        DropSkip,
        DropResampler,
    )
}


def operator_named(name: str) -> type[Operator]:
    """The class of an operator. Raises `GenpruneError` for an unknown name."""
    if name not in OPERATORS:
        raise GenpruneError(
            f"no operator '{name}'{nearest(name, OPERATORS)}; expected one of {', '.join(OPERATORS)}. "
            "Pass one of those names."
        )
    return OPERATORS[name]


def build_operator(name: str, removed: nn.Module, settings: Mapping[str, Any]) -> Operator:
    """The named operator in the place of `removed`, without values yet; see `Operator.build`."""
    return operator_named(name).build(removed, settings)


__all__ = ["OPERATORS", "Operator", "beside", "build_operator", "operator_named"]
