"""What a model holds and how far it can shrink, from its shapes alone: what `genprune inspect` shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from genprune.allocation.reachable import least_keep
from genprune.allocation.request import Request, default_kinds
from genprune.costs import SiteCosts, dense_costs, operating_point, site_costs
from genprune.families import host_name


@dataclass(frozen=True)
class KindSummary:
    """All sites of one kind.

    Args:
        kind, sites, units: which and how many.
        params, macs: what all their units hold together; kinds nest, so these do not add up over kinds.
        least_params, least_macs: share of the dense model that stays when only this kind is cut as far as it goes.
    """

    kind: str
    sites: int
    units: int
    params: int
    macs: int
    least_params: float
    least_macs: float


@dataclass(frozen=True)
class Inspection:
    """Everything `genprune inspect` prints.

    Args:
        host: class of the model. pruned: whether it was cut before.
        params, macs: as it is. dense_params, dense_macs: of the dense model, which budgets count against.
        operating_point: the input that MACs hold at.
        kinds: finest first.
        least: `default kinds` and `all kinds` -> smallest reachable share of `params` and `macs`.
        refused: site name -> why it cannot be cut.
    """

    host: str
    pruned: bool
    params: int
    macs: int
    dense_params: int
    dense_macs: int
    operating_point: Mapping[str, int]
    kinds: tuple[KindSummary, ...]
    least: Mapping[str, Mapping[str, float]]
    refused: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"format_version": 1, **asdict(self)}


def inspect_model(model: nn.Module, **given: int) -> Inspection:
    """Sites, costs and reach of a model; its weights are not read.

    Args:
        model: supported, on any device (meta included), dense or cut.
        given: fields of the operating point that are not the family's default (`height`, `width`, ...).

    Raises:
        UnsupportedModel: no family knows the class. GenpruneError: an unknown field.
    """
    point = operating_point(model, **given)
    costs, dense = site_costs(model, point), dense_costs(model, **asdict(point))
    sites = costs.sites
    narrowing = default_kinds(sites)
    least = {"all kinds": _least(costs, dense, sites.kinds())}
    if narrowing:
        least = {"default kinds": _least(costs, dense, narrowing), **least}
    return Inspection(
        host=host_name(model),
        pruned=costs.total.params != dense.params,
        params=costs.total.params,
        macs=costs.total.macs,
        dense_params=dense.params,
        dense_macs=dense.macs,
        operating_point=asdict(point),
        kinds=tuple(_summary(kind, costs, dense) for kind in sites.kinds()),
        least=least,
        refused=dict(sites.refused),
    )


def _summary(kind: str, costs: SiteCosts, dense) -> KindSummary:
    members = [site for site in costs.sites.values() if site.kind == kind]
    without = costs.predict_widths({site.name: 0 for site in members})
    least = _least(costs, dense, (kind,))
    return KindSummary(
        kind=kind,
        sites=len(members),
        units=sum(site.size for site in members),
        params=costs.total.params - without.params,
        macs=costs.total.macs - without.macs,
        least_params=least["params"],
        least_macs=least["macs"],
    )


def _least(costs: SiteCosts, dense, kinds: tuple[str, ...]) -> dict[str, float]:
    return {
        of: least_keep(costs, getattr(dense, of), Request(keep=1.0, of=of, kinds=kinds)) for of in ("params", "macs")
    }
