"""The `pruning` entry of a model's configuration: kept units and operators, and a skeleton built from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genprune.cutting import pruned_ops, pruned_widths, shrink_
from genprune.errors import PlanMismatch, nearest
from genprune.families import find_sites
from genprune.operations import check_form, effective_ops, no_values, operator_of, put
from genprune.plan import PruningPlan
from genprune.sites import Sites

FORMAT_VERSION = 2  # 2 has operations
PRUNING_KEY = "pruning"


def pruning_entry(widths: Mapping[str, int], ops: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The configuration entry: plain JSON data, a few KB; format 1 where there are no operations."""
    entry = {"format_version": 2 if ops else 1, "widths": dict(widths)}
    return entry | ({"ops": [dict(op) for op in ops]} if ops else {})


def read_ops(entry: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The operations in a `pruning` entry that `read_widths` accepted. Raises `PlanMismatch`."""
    ops = entry.get("ops", ())
    check_form(ops)
    return tuple(no_values(ops))


def read_widths(entry: Any, source: str) -> dict[str, int]:
    """Site name -> kept units, from a configuration's `pruning` entry.

    Args:
        entry: what stands under `pruning`.
        source: the class or folder it was found in, for the messages.

    Raises:
        PlanMismatch: it is missing or damaged, or a newer genprune wrote it.
    """
    again = "Save the model again with save_pretrained, or restore its config.json."
    if entry is None:
        raise PlanMismatch(
            f"the config of {source} has no '{PRUNING_KEY}' entry; expected the widths of a pruned model. A dense "
            f"model loads with the class without `Pruned`. {again}"
        )
    version = entry.get("format_version") if isinstance(entry, Mapping) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise PlanMismatch(
            f"the '{PRUNING_KEY}' entry of {source} has format {version}, this genprune reads up to {FORMAT_VERSION}. "
            "Upgrade with `pip install -U genprune`."
        )
    widths = entry.get("widths") if isinstance(entry, Mapping) else None
    ops = entry.get("ops", []) if isinstance(entry, Mapping) else None
    listed = isinstance(ops, (list, tuple)) and all(isinstance(op, Mapping) for op in ops)
    if version not in range(1, FORMAT_VERSION + 1) or not isinstance(widths, Mapping) or not listed:
        raise PlanMismatch(
            f"the '{PRUNING_KEY}' entry of {source} is damaged: expected "
            f'{{"format_version": 1, "widths": {{site: kept units}}}}. {again}'
        )
    for name, width in widths.items():
        if isinstance(width, bool) or not isinstance(width, int) or width < 0:
            raise PlanMismatch(
                f"the '{PRUNING_KEY}' entry of {source} keeps {width!r} units at '{name}'; expected a whole number "
                f">= 0. {again}"
            )
    return {str(name): int(width) for name, width in widths.items()}


def first_units(sites: Sites, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Masks that keep the first `width` units of each site: right shapes, before the weights are loaded.

    Raises:
        PlanMismatch: a site is unknown, or keeps more units than it has.
    """
    keep = {}
    for name, width in widths.items():
        if name not in sites or width > sites[name].size:
            found = f"keeps {width} of {sites[name].size} units at" if name in sites else "names"
            raise PlanMismatch(
                f"the '{PRUNING_KEY}' entry {found} '{name}', which {sites.host} does not have"
                f"{'' if name in sites else nearest(name, sites)}. The config was edited, or belongs to another "
                "model: save the model again with save_pretrained."
            )
        keep[name] = torch.arange(sites[name].size) < width
    return keep


def skeleton(build: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """What `build(...)` makes, with its parameters on the meta device and the buffers that no file holds on the CPU.

    Masks, and the indices of a cut skeleton, stay real tensors.
    """
    from accelerate import init_empty_weights

    with init_empty_weights():
        return build(*args, **kwargs)


def apply_widths_(model: nn.Module, widths: Mapping[str, int], ops: Sequence[Mapping[str, Any]] = ()) -> None:
    """Shrink a dense skeleton to these widths and put operators where they stood, in place, on any device.

    Which units are kept comes with the weights: index buffers hold the first ones until a checkpoint is loaded.
    """
    sites = find_sites(model)
    with torch.device("cpu"):  # masks hold values, also where the caller builds everything on the meta device
        keep = first_units(sites, widths)
        shrink_(model, sites, keep)
    apply_ops_(model, ops, sites, keep)
    model._genprune_widths = dict(widths)
    model._genprune_ops = tuple(no_values(ops))


def apply_ops_(model: nn.Module, ops: Sequence[Mapping[str, Any]], sites: Sites, keep: Mapping[str, Tensor]) -> None:
    """Put operators where a skeleton's modules stood, without values, in place.

    Args:
        model: shrunk by `keep` before.
        sites: of the model before that.

    Raises:
        PlanMismatch: a path or an operator is unknown, or does not fit.
    """
    check_form(ops)
    modules = dict(model.named_modules())
    for op in effective_ops(ops, sites, keep):
        if op["path"] not in modules:
            raise PlanMismatch(
                f"the '{PRUNING_KEY}' entry puts '{op['with']}' at '{op['path']}', which {sites.host} does not have"
                f"{nearest(op['path'], modules)}. The config was edited, or belongs to another model: save the model "
                "again with save_pretrained."
            )
        put(model, op["path"], operator_of(op, None, model.get_submodule(op["path"])))


def attach_saved_plan_(model: nn.Module, config: Mapping[str, Any], path: Path) -> None:
    """Give a loaded model the plan that lies beside its weights, where its configuration says that it was pruned.

    A dense model that was saved over a pruned folder leaves the old plan file there: it says nothing about it.

    Args:
        model: loaded, or a skeleton with its widths.
        config: what `config.json` holds.
        path: of the plan; nothing happens where there is no such file.

    Raises:
        PlanMismatch: the plan and the configuration disagree.
    """
    if PRUNING_KEY not in config or not path.is_file():
        return
    plan = PruningPlan.load(path)
    check_same_widths(plan, pruned_widths(model), path)
    if [op["path"] for op in plan.ops] != [op["path"] for op in pruned_ops(model)]:
        raise PlanMismatch(
            f"'{path}' has {len(plan.ops)} operators, the config beside it {len(pruned_ops(model))} or others; "
            "expected the same. The folder is half-written or mixed from two models: save it again with "
            "save_pretrained."
        )
    model._genprune_plan = plan


def check_same_widths(plan: PruningPlan, widths: Mapping[str, int], path: str | os.PathLike) -> None:
    """Raises `PlanMismatch` where the plan beside the weights is not the one that the config's widths came from."""
    planned = narrowed(plan)
    for name in sorted(planned.keys() | widths.keys()):
        if planned.get(name) != widths.get(name):
            raise PlanMismatch(
                f"'{path}' keeps {planned.get(name, 'all')} units at '{name}', the config beside it "
                f"{widths.get(name, 'all')}; expected the same. The folder is half-written or mixed from two models: "
                "save it again with save_pretrained."
            )


def narrowed(plan: PruningPlan) -> dict[str, int]:
    """Kept units of every site that loses some under the plan."""
    return {name: int(mask.sum()) for name, mask in plan.keep.items() if not mask.all()}
