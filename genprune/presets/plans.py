"""`preset_plan`: a published shape as an ordinary plan, with exact figures of the model that it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from genprune.costs import count_costs
from genprune.costs import operating_point as operating_point_of
from genprune.cutting import plan_base, was_cut
from genprune.errors import GenpruneError, PlanMismatch, nearest
from genprune.families import OperatingPoint, denoiser, find_sites
from genprune.operations import meta_shrunk
from genprune.plan import PruningPlan
from genprune.presets.alternate_layers import HOSTS, alternate_blocks
from genprune.presets.unet_shapes import UNET_SHAPES, WHICH, check_layout, removed_parts
from genprune.widths import apply_widths_, narrowed

ALTERNATE = "alternate-layers"


@dataclass(frozen=True)
class PresetCard:
    """One preset.

    Attributes:
        name: what `preset_plan` takes.
        host: the dense models that it is a shape of.
        params: of the published denoiser; None where it depends on the host.
        summary: what goes, and who published it.
    """

    name: str
    host: str
    params: int | None
    summary: str


def preset_cards() -> tuple[PresetCard, ...]:
    """The presets by name."""
    cards = [PresetCard(name, each.host_text, each.params, each.summary) for name, each in UNET_SHAPES.items()]
    alternate = "every other transformer block goes, or an even spread of them (`keep=`)"
    return (*cards, PresetCard(ALTERNATE, ", ".join(HOSTS), None, alternate))


def preset_plan(
    target: Any,
    name: str,
    *,
    keep: float | None = None,
    which: str | None = None,
    operating_point: OperatingPoint | Mapping[str, int] | None = None,
) -> PruningPlan:
    """The plan that gives a dense model a published shape; what stays keeps the model's own weights.

    `gp.cut(target, plan)` applies it, and `gp.export_stock(target, folder)` then writes a stock configuration. Nothing
    is scored, and nothing is trained: a cut model needs recovery before its pictures are worth looking at.

    Args:
        target: a dense model or the pipeline that holds it, on any device; not touched.
        name: one of `preset_cards()`.
        keep: for `alternate-layers`: share of the blocks of each list that stays, in (0, 1). Default: every other.
        which: for shapes of SDXL, which transformer blocks stay where some of a wrapper go: `"first"` (default), as
            when the published configuration is loaded with the dense weights, or `"even"`, spread over the wrapper.
        operating_point: where MACs are counted, whole or some fields. Default: the family's.

    Returns:
        A `PruningPlan` with exact params and MACs of dense and pruned.

    Raises:
        GenpruneError: an unknown preset or option. UnsupportedModel: the model is not of the shape's host.
        PlanMismatch: the model was cut before.
    """
    _check_options(name, keep, which)
    model = denoiser(target)
    if was_cut(model):
        raise PlanMismatch(
            f"this {type(model).__name__} was cut before; expected a dense model, which '{name}' is a shape of. Load "
            "the base again, and make the plan on that."
        )
    sites, ops = find_sites(model), []
    if name == ALTERNATE:
        removed, settings = alternate_blocks(model, sites, keep), {"keep": keep}
    else:
        check_layout(model, name)
        removed, ops = removed_parts(model, UNET_SHAPES[name], which or WHICH[0])
        settings = {"which": which or WHICH[0]}
    plan = PruningPlan(
        plan_base(model, sites),
        {name: torch.zeros(sites[name].size, dtype=torch.bool) for name in removed},
        ops=tuple(ops),
        made_by={"preset": name, "settings": settings},
    )
    given = asdict(operating_point) if isinstance(operating_point, OperatingPoint) else dict(operating_point or {})
    return with_figures(model, plan, operating_point_of(model, **given))


def with_figures(model: nn.Module, plan: PruningPlan, point: OperatingPoint) -> PruningPlan:
    """The plan with params and MACs, counted on the cut model: a removed resampler changes what others see."""
    dense = count_costs(model, **asdict(point))
    small = count_costs(
        meta_shrunk(model, lambda meta: apply_widths_(meta, narrowed(plan), plan.ops)), **asdict(point)
    )
    figures = {"dense_params": dense.params, "params": small.params, "dense_macs": dense.macs, "macs": small.macs}
    return replace(plan, operating_point=asdict(point), figures=figures)


def _check_options(name: str, keep: float | None, which: str | None) -> None:
    names = (*UNET_SHAPES, ALTERNATE)
    if name not in names:
        raise GenpruneError(f"no preset '{name}'{nearest(str(name), names)}; expected one of {', '.join(names)}.")
    if keep is not None and name != ALTERNATE:
        raise GenpruneError(
            f"keep={keep!r} with '{name}', whose size is fixed; expected no keep. Leave it out, or make a plan under "
            "a budget with gp.make_plan."
        )
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep < 1):
        raise GenpruneError(f"keep={keep!r}; expected a share of the blocks between 0 and 1. Pass e.g. keep=0.5.")
    if which is not None and name == ALTERNATE:
        raise GenpruneError(
            f"which={which!r} with '{name}', whose blocks are spread already; expected none. Leave it."
        )
    if which is not None and which not in WHICH:
        raise GenpruneError(
            f"which={which!r}{nearest(str(which), WHICH)}; expected one of {', '.join(WHICH)}. Pass one."
        )
