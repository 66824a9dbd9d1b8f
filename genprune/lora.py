"""LoRAs of a dense base on a model that was cut: sliced by the plan, or refused where they were not."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from genprune.cutting import applied_plan, layer_masks, plan_base, pruned_ops, pruned_widths, shrink_, was_cut
from genprune.errors import NoMatchingSites, PlanMismatch, nearest
from genprune.families import denoiser, family_named, family_of, find_sites
from genprune.lora_names import LoraTensor, parsed, read_lora, renamed_by, renamed_for_diffusers
from genprune.plan import PruningPlan
from genprune.replacements import ScatteredLinear, Tombstone
from genprune.sites import effective_keep
from genprune.stock import stock_export_of
from genprune.widths import apply_ops_, apply_widths_, skeleton


@dataclass(frozen=True)
class _Cut:
    """What a plan leaves of each layer that holds a weight.

    Args:
        dense: module path -> shape of its weight before the cut.
        left: module path -> shape of its weight after the cut; None where the layer went.
        masks: (module path, `"out"` or `"in"`) -> kept rows or columns.
    """

    dense: dict[str, tuple[int, ...]]
    left: dict[str, tuple[int, ...] | None]
    masks: Mapping[tuple[str, str], Tensor]


def adapt_lora(
    state_dict: Mapping[str, Tensor] | str | os.PathLike, plan: Any, base: Any = None, *, for_stock: bool = False
) -> dict[str, Tensor]:
    """A LoRA of the dense base as it must be for the cut model: equal to adding the LoRA first and cutting then.

    Columns of `lora_A` and rows of `lora_B` go with the units that went, and layers that went lose their LoRA; ranks
    and alphas stay. Entries of text encoders pass unchanged.

    Args:
        state_dict: the LoRA by name, as diffusers and PEFT write it, or kohya's names for a U-Net or Flux (they come
            back under diffusers' names, with alpha folded in); or the path of its `.safetensors` file. From a file
            the alphas in its metadata are folded in too, which a dictionary cannot carry.
        plan: the plan for the dense base, or the path of one; or the cut model, or its pipeline, which knows its plan.
        base: with a plan: the dense model (on any device, meta included), its pipeline, or its configuration as a
            dictionary. Left out where `plan` is the cut model. No weights are read.
        for_stock: for what `gp.export_stock` wrote of the cut model: layers under the names that they have there.

    Returns:
        A new dictionary for `pipe.load_lora_weights` or `model.load_lora_adapter`.

    Raises:
        NoMatchingSites: nothing in it belongs to the model.
        PlanMismatch: a layer is unknown or has another size than in the base, the plan is for another model, or the
            LoRA is of a kind that cannot be sliced exactly (DoRA, LoKr, LoHa).
        UnsupportedModel: `for_stock`, and no stock configuration says what the plan leaves.
    """
    if isinstance(state_dict, (str, os.PathLike)):
        state_dict = read_lora(state_dict)
    plan, config = _plan_and_config(plan, base)
    family = family_named(plan.base.host)
    dense = skeleton(family.build, config)
    if plan_base(dense) != plan.base:
        raise PlanMismatch(
            f"the plan is for another configuration of {plan.base.host} ({plan.base.sites_sha256[:12]}, the base is "
            f"{plan_base(dense).sites_sha256[:12]}). Pass the dense base that the plan was made for."
        )
    state_dict = renamed_for_diffusers(state_dict, plan.base.host, dense)
    export = stock_export_of(dense, plan.keep, plan.ops) if for_stock else None
    cut = _what_is_left(dense, plan)
    adapted, belongs = {}, False
    for name, value in state_dict.items():
        entry = parsed(name)
        if entry is None:  # a text encoder's
            adapted[name] = value
            continue
        _check_of_base(entry, value, cut, plan.base.host)
        belongs = True
        shape = cut.left[entry.path]
        if shape is not None and 0 not in shape:
            new = name if export is None else renamed_by(name, entry.path, export.renamed)
            adapted[new] = _sliced(entry, value, cut.masks)
    if not belongs:
        raise NoMatchingSites(
            f"none of the {len(state_dict)} entries belongs to {plan.base.host}; expected names such as "
            f"'transformer.LAYER.lora_A.weight' or 'unet.LAYER.lora_A.weight'. Pass the LoRA of this base."
        )
    return adapted


def _plan_and_config(plan: Any, base: Any) -> tuple[PruningPlan, dict[str, Any]]:
    if isinstance(plan, (str, os.PathLike)):
        plan = PruningPlan.load(plan)
    if isinstance(plan, PruningPlan):
        if base is None:
            raise PlanMismatch(
                "a plan alone does not say how its base is built; expected the base beside it. Call "
                "gp.adapt_lora(state_dict, plan, base) with the dense model or its config, or pass the cut pipeline."
            )
        if isinstance(base, Mapping):
            return plan, {k: v for k, v in base.items() if not k.startswith("_")}
        model = denoiser(base)
        return plan, family_of(model).config(model)
    model = denoiser(plan)
    if (known := applied_plan(model)) is None:
        found = "was cut, but the plan is not with it" if was_cut(model) else "was not cut"
        raise PlanMismatch(
            f"this {type(model).__name__} {found}; expected a cut model with its genprune_plan.safetensors. Pass the "
            "plan and the dense base: gp.adapt_lora(state_dict, plan, base)."
        )
    return known, family_of(model).config(model)


def _weights(model: nn.Module) -> dict[str, tuple[int, ...]]:
    found = {path: module._parameters.get("weight") for path, module in model.named_modules()}
    return {path: tuple(weight.shape) for path, weight in found.items() if weight is not None}


def _what_is_left(model: nn.Module, plan: PruningPlan) -> _Cut:
    """Shapes before and after a cut of a skeleton, which is cut on the way. What operators replaced is gone."""
    sites, dense = find_sites(model), _weights(model)
    masks = layer_masks(model, sites, effective_keep(sites, plan.keep))
    shrink_(model, sites, plan.keep)
    apply_ops_(model, plan.ops, sites, plan.keep)
    after = _weights(model)
    return _Cut(dense, {path: after.get(path) for path in dense}, masks)


def _check_of_base(entry: LoraTensor, value: Tensor, cut: _Cut, host: str) -> None:
    """Raises `PlanMismatch` where a LoRA tensor is not for the dense base."""
    if entry.part == "unknown" or entry.path not in cut.dense:
        what = "is of a kind that cannot be sliced" if entry.part == "unknown" else f"names no layer of {host}"
        raise PlanMismatch(
            f"'{entry.name}' {what}{nearest(entry.path, cut.dense)}; expected lora_A and lora_B (or lora_down and "
            "lora_up) of layers of the dense base. DoRA, LoKr and LoHa change with the width of a layer: merge such "
            "an adapter into the base and cut that."
        )
    axis = {"down": 1, "up": 0}.get(entry.part)
    if axis is not None and value.shape[min(axis, value.ndim - 1)] != cut.dense[entry.path][axis]:
        raise PlanMismatch(
            f"'{entry.name}' has shape {tuple(value.shape)}; the dense {host} has {cut.dense[entry.path]} there. "
            "Expected a LoRA of the dense base: was it adapted already, or trained on another base?"
        )


def _sliced(entry: LoraTensor, value: Tensor, masks: Mapping[tuple[str, str], Tensor]) -> Tensor:
    axis, side = {"down": (1, "in"), "up": (0, "out")}.get(entry.part, (None, None))
    mask = masks.get((entry.path, side))
    if mask is None:
        return value
    return value.index_select(axis, mask.nonzero().flatten().to(value.device)).contiguous()


# ---- loading a LoRA on a cut model ----------------------------------------------------------------------------------


def check_fits(model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str | None) -> None:
    """Refuse a LoRA that is not for this cut model, before anything of it is loaded.

    What diffusers knows to do with layers that the cut left alone (Flux control LoRAs) stays its business.

    Args:
        model: a Pruned model, with or without other adapters.
        prefix: only names that begin with it count, as in `load_lora_adapter`; None: all.

    Raises:
        PlanMismatch: a tensor has another size than its layer here, or its layer went; names `gp.adapt_lora`.
    """
    family = family_of(model)
    empty = skeleton(family.build, family.config(model))
    dense = _weights(empty)
    apply_widths_(empty, pruned_widths(model), pruned_ops(model))
    left = _weights(empty)
    for name, value in state_dict.items():
        if prefix is not None and not name.startswith(f"{prefix}."):
            continue
        entry = parsed(name)
        if entry is None or entry.path not in dense:
            continue
        shape, axis = left.get(entry.path), {"down": 1, "up": 0}.get(entry.part)
        given = None if axis is None else value.shape[min(axis, value.ndim - 1)]
        # Wider than a layer that the cut left alone: Flux control LoRAs, for which diffusers widens the layer.
        widens = shape == dense[entry.path] and given is not None and given > shape[axis]
        if shape is None or (given is not None and given != shape[axis] and not widens):
            here = "went with the cut" if shape is None else f"has a weight of shape {shape}"
            raise PlanMismatch(
                f"'{name}' has shape {tuple(value.shape)}, but that layer {here} in this {type(model).__name__}: the "
                "LoRA is for another model, most likely the dense base. Load gp.adapt_lora(lora, pipe) instead."
            )


def scatter_adapters_(model: nn.Module) -> None:
    """Let LoRAs on layers that compute some of their outputs add to the right ones.

    PEFT adds `lora_B`'s output, one number for each computed output, to the layer's full one.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and isinstance(base := module.get_base_layer(), ScatteredLinear):
            for up in getattr(module, "lora_B", {}).values():
                if not any(getattr(hook, "__self__", None) is base for hook in up._forward_hooks.values()):
                    up.register_forward_hook(base.scatter_output)


def without_removed_layers(config: Any, model: nn.Module) -> Any:
    """A PEFT configuration that leaves out the layers that went: they still stand under their names.

    Args:
        config: a `peft` configuration; not changed.
        model: a Pruned model.
    """
    gone = [path for path, module in model.named_modules() if isinstance(module, Tombstone)]
    if not gone or not hasattr(config, "exclude_modules"):
        return config
    config, given = copy.copy(config), config.exclude_modules
    if isinstance(given, str):  # a regular expression
        config.exclude_modules = "|".join([f"(?:{given})", *map(re.escape, gone)])
    else:
        config.exclude_modules = {*(given or ()), *gone}
    return config
