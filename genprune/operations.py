"""Operations of a plan: operators that take host modules' places, after everything that shrinks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from genprune.errors import GenpruneError, PlanMismatch, nearest
from genprune.operators import Operator, beside, build_operator
from genprune.sites import Sites

REPLACE = "replace"
_KEYS = {"op", "path", "with", "settings"}


def replace_op(path: str, operator: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The operation that puts an operator in the place of the module at `path`, as plain JSON data.

    Args:
        path: of the host's module.
        operator: its name, one of `genprune.operators.OPERATORS`.
        settings: of that operator. Its values are the plan's tensors `{path}.{name}`, see `operation_tensors`.
    """
    return {"op": REPLACE, "path": path, "with": operator, "settings": dict(settings or {})}


def operation_tensors(path: str, operator: Operator) -> dict[str, Tensor]:
    """An operator's values under the names that they have in a plan, on the CPU."""
    return {f"{path}.{name}": value.detach().cpu().contiguous() for name, value in operator.own_tensors().items()}


def operator_of(op: Mapping[str, Any], tensors: Mapping[str, Tensor] | None, removed: nn.Module) -> Operator:
    """The operator that an operation puts in the place of `removed`, on its device and in its dtype.

    Args:
        op: what `replace_op` gives.
        tensors: of the plan; None leaves the values to a checkpoint that is loaded later.

    Raises:
        PlanMismatch: the operator is unknown, cannot stand there, or its values are missing or of another shape.
    """
    path = op["path"]
    try:
        operator = build_operator(op["with"], removed, op["settings"])
    except PlanMismatch:
        raise
    except GenpruneError as error:
        raise PlanMismatch(f"the plan puts '{op['with']}' at '{path}': {error}") from None
    if tensors is not None:
        start = f"{path}."
        # Another operation may lie inside of this module: what is not this operator's own is not for it.
        names = operator.own_tensors()
        operator.load_own({name: tensors[start + name] for name in names if start + name in tensors})
    return operator.train(removed.training)


def check_form(ops: Iterable[Any]) -> None:
    """Refuse operations that this genprune does not know. Raises `PlanMismatch`."""
    unknown = sorted({str(op.get("op")) for op in ops if op.get("op") != REPLACE})
    if unknown:
        raise PlanMismatch(
            f"the plan has operations that this genprune does not know: {unknown}. "
            "Upgrade with `pip install -U genprune`."
        )
    for op in ops:
        right = set(op) == _KEYS and isinstance(op["path"], str) and isinstance(op["settings"], Mapping)
        if not right or not isinstance(op["with"], str):
            raise PlanMismatch(
                f"an operation of the plan is {dict(op)!r}; expected {sorted(_KEYS)}, as "
                "genprune.operations.replace_op gives. Make the plan again."
            )


def effective_ops(
    ops: Iterable[Mapping[str, Any]], sites: Sites, keep: Mapping[str, Tensor]
) -> list[Mapping[str, Any]]:
    """The operations that change something: those inside a part that the masks remove are left out."""
    gone = [change.module for name, mask in keep.items() if not mask.any() for change in sites[name].emptied]
    return [op for op in ops if not any(f"{op['path']}.".startswith(f"{path}.") for path in gone)]


def check_ops(meta: nn.Module, ops: Iterable[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> None:
    """Try operations on a copy without weights, so that nothing of the model changes where one does not fit.

    Args:
        meta: the model on the meta device, its masks applied; changed by this.

    Raises:
        PlanMismatch: a path is unknown, or as in `operator_of`.
    """
    paths = dict(meta.named_modules())
    for op in ops:
        check_path(op, paths, type(meta).__name__)
        put(meta, op["path"], operator_of(op, tensors, meta.get_submodule(op["path"])))


def check_path(op: Mapping[str, Any], paths: Iterable[str], host: str) -> None:
    """Refuse an operation whose place is none of these module paths. Raises `PlanMismatch`."""
    if op["path"] not in paths:
        raise PlanMismatch(
            f"the plan puts '{op['with']}' at '{op['path']}', which is no module of this {host}"
            f"{nearest(op['path'], paths)}. Make a plan for this model."
        )


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path, in the training mode of what stood there."""
    parent, _, name = path.rpartition(".")
    removed = model.get_submodule(path)
    if isinstance(module, Operator):
        beside(module, removed, model)
    module.train(removed.training)
    model.get_submodule(parent)._modules[name] = module


class OperatorOutput:
    """Returns what an operator makes of a module's inputs, in place of what the module made of them."""

    def __init__(self, operator: Operator):
        self.operator = operator

    def attach(self, module: nn.Module):
        return module.register_forward_hook(self.hook, with_kwargs=True)

    def hook(self, module: nn.Module, inputs: tuple, kwargs: dict, output):
        return self.operator(*inputs, **kwargs)


def no_values(ops: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Operations as a configuration holds them: plain data, their values being among the weights."""
    return [{**op, "settings": dict(op["settings"])} for op in ops]


def meta_shrunk(model: nn.Module, shrink) -> nn.Module:
    """A copy of a model on the meta device after `shrink(copy)`."""
    from genprune.costs import meta_copy

    meta = meta_copy(model)
    with torch.device("cpu"):
        shrink(meta)
    return meta
