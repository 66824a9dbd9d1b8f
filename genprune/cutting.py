"""The physical cut: a plan becomes smaller layers, in place. Knows layers, not hosts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from genprune.cut_guards import as_plan, check_cuttable, check_room, whole_or_marked
from genprune.errors import PlanMismatch, UnsupportedModel, nearest
from genprune.families import denoiser, denoiser_slot, find_sites, host_name
from genprune.gates import gated_sites
from genprune.interrupts import interrupt_deferred
from genprune.operations import check_form, check_ops, effective_ops, meta_shrunk, no_values, operator_of, put
from genprune.plan import PlanBase, PruningPlan
from genprune.replacements import ScatteredLinear
from genprune.sites import Sites, SizeAttribute, Slice, effective_keep, kept_entries


def plan_base(model: nn.Module, sites: Sites | None = None) -> PlanBase:
    """The base that plans for this model carry: host class, and a fingerprint of its sites and of the layers they cut.

    Nothing else of the configuration counts, so that one plan serves every fine-tune of a base.
    """
    sites = find_sites(model) if sites is None else sites
    described = [
        [name, site.size, [[p.module, p.side, p.offset, p.width, *_shape(model, p.module)] for p in site.slices]]
        for name, site in sorted(sites.items())
    ]
    return PlanBase(host_name(model), hashlib.sha256(json.dumps(described).encode()).hexdigest())


def _shape(model: nn.Module, path: str) -> tuple[int, ...]:
    return tuple(model.get_submodule(path).weight.shape)


def applied_plan(model: nn.Module) -> PruningPlan | None:
    """The plan that a model was cut by, in the dense model's indices; None where it is dense or indices are lost."""
    return model.__dict__.get("_genprune_plan")


def pruned_widths(model: nn.Module) -> dict[str, int]:
    """Kept units of every site that an earlier cut narrowed; empty for a dense model."""
    return dict(model.__dict__.get("_genprune_widths", {}))


def pruned_ops(model: nn.Module) -> tuple[dict[str, Any], ...]:
    """The operations of earlier cuts, as a configuration holds them; empty for a dense model."""
    return tuple(model.__dict__.get("_genprune_ops", ()))


def was_cut(model: nn.Module) -> bool:
    """Whether an earlier cut took units, layers or operators from this model."""
    return bool(pruned_widths(model) or pruned_ops(model))


# ---- one cut --------------------------------------------------------------------------------------------------------


def check_plan(model: nn.Module, plan: PruningPlan, sites: Sites) -> None:
    """Refuse a plan that is not for this model, before anything changes. Raises `PlanMismatch`."""
    base = plan_base(model, sites)
    if plan.base.host != base.host:
        raise PlanMismatch(
            f"the plan is for {plan.base.host}, the model is {type(model).__name__} ({base.host}). "
            "Make a plan for this model with gp.make_plan(model, ...)."
        )
    for name, mask in plan.keep.items():
        if name not in sites:
            raise PlanMismatch(
                f"the plan names '{name}', which is no site of this {type(model).__name__}{nearest(name, sites)}. "
                "Was the model cut already? Plans for a cut model are made on it."
            )
        if mask.numel() != sites[name].size:
            raise PlanMismatch(
                f"the plan has {mask.numel()} units at '{name}', the model has {sites[name].size}. "
                "Make a plan for this model with gp.make_plan(model, ...)."
            )
    if plan.base.sites_sha256 != base.sites_sha256:
        raise PlanMismatch(
            f"the plan was made for another configuration of {base.host} "
            f"({plan.base.sites_sha256[:12]}, this model is {base.sites_sha256[:12]}). "
            "Use the base that it was made for, or make a plan for this model with gp.make_plan(model, ...)."
        )
    check_form(plan.ops)
    if ops := effective_ops(plan.ops, sites, plan.keep):
        check_ops(meta_shrunk(model, lambda meta: shrink_(meta, sites, plan.keep)), ops, plan.tensors)


def layer_masks(model: nn.Module, sites: Sites, keep: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    """(module path, `"out"` or `"in"`) -> bool mask of the entries that stay, for every layer that shrinks."""
    pieces: dict[tuple[str, str], list[tuple[Slice, Tensor]]] = {}
    for name, mask in keep.items():
        site, kept = sites[name], int(mask.sum())
        for piece in site.slices:
            if site.shrinks(piece.module, kept):
                pieces.setdefault((piece.module, piece.side), []).append((piece, mask))
    masks = {}
    for (path, side), parts in pieces.items():
        weight = model.get_submodule(path).weight
        masks[path, side] = kept_entries(torch.ones(weight.shape[side == "in"], dtype=torch.bool), parts)
    return masks


def shrink_(model: nn.Module, sites: Sites, keep: Mapping[str, Tensor]) -> None:
    """Cut the model by masks that were checked before, in place, one layer at a time (peak: one extra layer).

    Raises:
        UnsupportedModel: a layer cannot be narrowed (quantised, or wrapped by an adapter); nothing has changed then.
        CutFailed: something failed midway; the model is marked as partly cut.
    """
    keep, masks = _checked(model, sites, keep)
    with whole_or_marked(model):
        _shrink_checked_(model, sites, keep, masks)


_Masks = dict[tuple[str, str], Tensor]


def _checked(model: nn.Module, sites: Sites, keep: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], _Masks]:
    """What to do, after every check: the masks that change something, and those of the layers that shrink."""
    keep = effective_keep(sites, keep)
    masks = layer_masks(model, sites, keep)
    for (path, side), mask in masks.items():
        _check_layer(path, model.get_submodule(path), side, mask)
    check_room(model, masks)
    return keep, masks


def _shrink_checked_(model: nn.Module, sites: Sites, keep: Mapping[str, Tensor], masks: _Masks) -> None:
    scattered = {p.module for name in keep for p in sites[name].slices if p.scatter}
    # Attributes and removed modules first: both read the model as it was.
    for name, mask in keep.items():
        site, kept = sites[name], int(mask.sum())
        for attribute in site.attributes:
            if site.shrinks(attribute.module, kept):
                _set_attribute(model.get_submodule(attribute.module), attribute, kept)
        if kept == 0:
            for change in site.emptied:
                put(model, change.module, change.build(model.get_submodule(change.module)))
    for (path, side), mask in masks.items():
        if path in scattered:
            put(model, path, _scattered(model.get_submodule(path), mask))
        else:
            _narrow_(model.get_submodule(path), side, mask)


def _check_layer(path: str, module: nn.Module, side: str, mask: Tensor) -> None:
    if isinstance(module, nn.Linear):
        features = (module.out_features, module.in_features)
    elif isinstance(module, nn.Conv2d) and module.groups == 1:
        features = (module.out_channels, module.in_channels)
    elif isinstance(module, nn.GroupNorm):
        features = (module.num_channels,)
    else:
        raise UnsupportedModel(
            f"'{path}' is a {type(module).__name__}; expected a Linear, Conv2d or GroupNorm layer. "
            "Cut the model before adapters are added and before it is quantised."
        )
    if tuple(module.weight.shape[: len(features)]) != features or mask.numel() != features[side == "in"]:
        raise UnsupportedModel(
            f"'{path}' has a weight of shape {tuple(module.weight.shape)}; expected {features} first, as in a plain "
            f"{type(module).__name__}. Cut the model before it is quantised."
        )


def _set_attribute(module: nn.Module, attribute: SizeAttribute, kept: int) -> None:
    value = attribute.per_unit * kept
    if attribute.item is not None:
        numbers = list(getattr(module, attribute.name))
        numbers[attribute.item] = value
        value = numbers
    setattr(module, attribute.name, value)


def _selected(parameter: Tensor, dim: int, mask: Tensor) -> nn.Parameter:
    index = mask.nonzero().flatten().to(parameter.device)
    return nn.Parameter(parameter.detach().index_select(dim, index).contiguous(), parameter.requires_grad)


def _narrow_(module: nn.Module, side: str, mask: Tensor) -> None:
    """Keep the marked rows (`"out"`) or columns (`"in"`) of a layer, and the numbers that describe them."""
    total, kept = mask.numel(), int(mask.sum())
    if isinstance(module, nn.GroupNorm):  # its sites cut whole groups
        module.num_groups = module.num_groups * kept // total
        module.num_channels = kept
    elif isinstance(module, nn.Conv2d):
        setattr(module, "out_channels" if side == "out" else "in_channels", kept)
    else:
        setattr(module, "out_features" if side == "out" else "in_features", kept)
    if side == "in":
        module.weight = _selected(module.weight, 1, mask)
        return
    for name in ("weight", "bias"):
        if getattr(module, name, None) is not None:
            setattr(module, name, _selected(getattr(module, name), 0, mask))


def _scattered(linear: nn.Linear, mask: Tensor) -> ScatteredLinear:
    """The linear with fewer rows that still returns its full width. Cuts one that is scattered already further."""
    if isinstance(linear, ScatteredLinear):
        index, full = linear.index[mask.nonzero().flatten().to(linear.index.device)], linear.full_features
    else:
        index, full = mask.nonzero().flatten(), linear.out_features
    narrow = ScatteredLinear(linear.in_features, index, full, linear.bias is not None, device="meta")
    narrow.index = index.to(linear.weight.device)
    narrow.weight = _selected(linear.weight, 0, mask)
    if linear.bias is not None:
        narrow.bias = _selected(linear.bias, 0, mask)
    return narrow


def cut(target, plan: PruningPlan | str | os.PathLike):
    """Cut a model for real, in place: smaller layers, removed blocks; same host, same `from_pretrained`.

    Args:
        target: the supported model, or the pipeline, that the plan was made for.
        plan: what stays; a `PruningPlan`, or the path of one. The whole plan is checked before anything changes, and
            Ctrl-C waits for the end of the cut.

    Returns:
        `target` itself. A diffusers model has become its `Pruned...` class (still an instance of the host's class),
        and a pipeline's component is registered again, so that `save_pretrained` and `from_pretrained` work.

    Raises:
        UnsupportedModel: no family knows the model, or a layer cannot be narrowed. PlanMismatch: the plan is for
        another model, or gates, an adapter or an offload are still attached. torch.OutOfMemoryError: there is no room
        for one more layer. In these cases the model is as it was.
        CutFailed: something failed after the first change. The old weights are not kept (that would take a second
        model's memory), so the model stays partly cut: it refuses to run, to be saved and to be cut. Load it again.
    """
    from genprune import saving

    model, plan = denoiser(target), as_plan(plan)
    check_cuttable(model)
    sites = find_sites(model)
    check_plan(model, plan, sites)
    if gated := gated_sites(model):
        raise PlanMismatch(
            f"gates are attached to {len(gated)} sites ('{gated[0]}', ...); expected a model without. "
            "Call handle.remove() first: the cut reads the plan, not the gates."
        )
    before = applied_plan(model)
    if before is None and was_cut(model):
        raise PlanMismatch(
            "this model was cut before, but the plan of that cut is not with it; expected genprune_plan.safetensors "
            "in its folder. Load it from the folder that save_pretrained wrote."
        )
    joined = plan if before is None else before.then(plan)
    saving.check_adoptable(model)
    widths = pruned_widths(model) | {n: int(mask.sum()) for n, mask in plan.keep.items() if not mask.all()}
    keep, masks = _checked(model, sites, plan.keep)
    ops = effective_ops(plan.ops, sites, plan.keep)
    with interrupt_deferred(), whole_or_marked(model):
        _shrink_checked_(model, sites, keep, masks)
        for op in ops:
            put(model, op["path"], operator_of(op, plan.tensors, model.get_submodule(op["path"])))
        model._genprune_plan = joined
        model._genprune_widths = widths
        # All of them, as in the joined plan: loading leaves those inside removed parts out again.
        model._genprune_ops = pruned_ops(model) + tuple(no_values(plan.ops))
        saving.adopt_(model)
        if (slot := denoiser_slot(target)) is not None:
            target.register_modules(**{slot: model})
    return target
