"""What keeps a cut whole: models that it is refused for, room for its largest step, a mark where it failed midway."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from genprune.errors import CutFailed, PlanMismatch
from genprune.plan import PruningPlan


def as_plan(plan: Any) -> PruningPlan:
    """A plan, or the one at a path. Raises `PlanMismatch` for anything else."""
    if isinstance(plan, (str, os.PathLike)):
        return PruningPlan.load(plan)
    if not isinstance(plan, PruningPlan):
        raise PlanMismatch(
            f"the plan is a {type(plan).__name__}; expected a PruningPlan, or the path of a saved one. Make one with "
            "gp.make_plan(model, ...)."
        )
    return plan


def check_cuttable(model: nn.Module) -> None:
    """Refuse a model whose layers are not all its own, before anything changes.

    Raises:
        PlanMismatch: an adapter is on a layer, tokens are reduced, or offloading holds the weights elsewhere.
        CutFailed: an earlier cut failed midway.
    """
    if model.__dict__.get("_genprune_cut_failed"):
        _refuse(model)
    if wrapped := [path for path, module in model.named_modules() if hasattr(module, "base_layer")]:
        raise PlanMismatch(
            f"an adapter is on {len(wrapped)} layers ('{wrapped[0]}', ...); expected a model without. Call "
            "pipe.fuse_lora() and then pipe.unload_lora_weights() to keep what the LoRA does, or only the second, "
            "and cut then."
        )
    if any(_reduces_tokens(hook) for module in model.modules() for hook in module._forward_pre_hooks.values()):
        raise PlanMismatch(
            f"tokens of this {type(model).__name__} are reduced by hooks on the blocks that the cut may take away; "
            "expected a model without. Call the handle's remove() first, and prune_tokens(...) after the cut."
        )
    for path, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(each, "offload", False) is True for each in getattr(hook, "hooks", (hook,))):
            raise PlanMismatch(
                f"offloading holds the weights of '{path}' outside of the model; expected them in it. Call "
                "pipe.remove_all_hooks() first (accelerate.hooks.remove_hook_from_submodules(model) for a bare "
                "model), and enable the offload after the cut."
            )
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and registry.get_hook("group_offloading") is not None:
            raise PlanMismatch(
                f"group offloading holds a list of the weights of '{path}'; expected a model without. Load it again, "
                "cut it, and enable the group offload after the cut."
            )


def _reduces_tokens(hook: Any) -> bool:
    """Whether a hook is of a token reduction, whose room is above this one: its state says so."""
    return getattr(getattr(getattr(hook, "__self__", None), "state", None), "reduces_tokens", False)


def check_room(model: nn.Module, masks: Mapping[tuple[str, str], Tensor]) -> None:
    """Have the allocator give, and take back, the memory of the largest new layer: too little shows up here.

    Every step of a cut allocates at most this much and frees more than it allocated.
    """
    largest: dict[torch.device, int] = {}
    for (path, _), mask in masks.items():
        weight = model.get_submodule(path).weight
        kept = math.ceil(weight.nbytes * int(mask.sum()) / mask.numel())
        largest[weight.device] = max(kept, largest.get(weight.device, 0))
    for device, size in largest.items():
        torch.empty(size, dtype=torch.uint8, device=device)


@contextmanager
def whole_or_marked(model: nn.Module) -> Iterator[None]:
    """Where the block fails, mark the model: it refuses to run, to be saved and to be cut from then on.

    Raises:
        CutFailed: from the error inside. What is no `Exception` (an interrupt) passes as it is.
    """
    try:
        yield
    except BaseException as error:
        model._genprune_cut_failed = True
        model.register_forward_pre_hook(_refuse)
        model.register_state_dict_pre_hook(_refuse)
        if not isinstance(error, Exception):
            raise
        raise CutFailed(_message(model, f"({type(error).__name__}: {error}) ")) from error


def _refuse(model: nn.Module, *ignored: Any) -> None:
    raise CutFailed(_message(model))


def _message(model: nn.Module, reason: str = "") -> str:
    return (
        f"a cut of this {type(model).__name__} failed midway {reason}and left it partly cut; expected a whole model. "
        "Load it again from where it came from, and cut that."
    )
