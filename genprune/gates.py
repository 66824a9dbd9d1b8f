"""Attach float gates to a model's sites by plain module hooks, and detach them without a trace."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from genprune.cut_guards import as_plan
from genprune.errors import PlanMismatch
from genprune.families import denoiser, find_sites
from genprune.operations import OperatorOutput, check_form, check_path, effective_ops, operator_of
from genprune.operators import beside
from genprune.plan import PruningPlan
from genprune.replacements import ScatteredLinear
from genprune.sites import GatePoint, Site, Sites


class Gate:
    """The gate of one site: `value` has shape `(size,)`, or `(rows, size)` where the rows of a batch differ.

    Its hooks are bound methods, so that a deep copy of the model carries its own gate (a closure would be shared).
    """

    def __init__(self, site: Site, value: Tensor):
        self.site = site
        self.value = value

    def features(self, activation: Tensor, point: GatePoint, module: nn.Module) -> Tensor:
        """The gate spread over one activation of `module`: ones, but for the features of this site's units."""
        # Cast at use: a float32 gate would promote a bfloat16 host and break its next layer.
        value = self.value.to(device=activation.device, dtype=activation.dtype)
        rows = value.shape[0] if value.ndim == 2 else 1
        if rows not in (1, activation.shape[0]):
            raise PlanMismatch(
                f"the gate of '{self.site.name}' has {rows} rows, the activation {activation.shape[0]}; expected one "
                "row per batch row. Set a gate of shape (size,), or one row for each."
            )
        if point.width == 0:  # the whole tensor
            return value.reshape(rows, *[1] * (activation.ndim - 1))
        value = value.reshape(rows, -1).repeat_interleave(point.width, dim=-1)  # (rows, size * width)
        dim = point.dim % activation.ndim
        scattered = isinstance(module, ScatteredLinear)
        total = module.out_features if scattered else activation.shape[dim]
        if value.shape[-1] != total:  # a packed input: other features pass
            before = value.new_ones(rows, point.offset)
            after = value.new_ones(rows, total - point.offset - value.shape[-1])
            value = torch.cat([before, value, after], dim=-1)
        if scattered:  # cut before: its units are the computed outputs among the full width
            wide = value.new_ones(rows, module.full_features)
            value = wide.index_copy(-1, module.index, value)
        shape = [rows] + [1] * (activation.ndim - 1)
        shape[dim] = value.shape[-1]
        return value.reshape(shape)


def _scaled(activation: Tensor, factor: Tensor) -> Tensor:
    """Their product in the memory layout of the activation.

    A linear layer that gets a view (one stream of a joint attention) rounds otherwise than for the same numbers side
    by side; in bfloat16 that is visible, so that a gate of one would not be bit-identical.
    """
    product = activation * factor
    if product.stride() == activation.stride() or 0 in activation.stride():
        return product
    return torch.empty_strided(
        activation.shape, activation.stride(), dtype=product.dtype, device=product.device
    ).copy_(product)


class GatedInput:
    """Multiplies the first argument of a module."""

    def __init__(self, gate: Gate, point: GatePoint):
        self.gate, self.point = gate, point

    def attach(self, module: nn.Module):
        return module.register_forward_pre_hook(self.hook)

    def hook(self, module: nn.Module, inputs: tuple) -> tuple:
        return (_scaled(inputs[0], self.gate.features(inputs[0], self.point, module)), *inputs[1:])


class GatedOutput:
    """Multiplies what a module returns; every tensor of a tuple."""

    def __init__(self, gate: Gate, point: GatePoint):
        self.gate, self.point = gate, point

    def attach(self, module: nn.Module):
        return module.register_forward_hook(self.hook)

    def hook(self, module: nn.Module, inputs: tuple, output):
        if isinstance(output, tuple):
            return tuple(self._gated(item, module) for item in output)
        return self._gated(output, module)

    def _gated(self, item, module: nn.Module):
        return _scaled(item, self.gate.features(item, self.point, module)) if isinstance(item, Tensor) else item


class BlendedOutput:
    """Blends what a block returns with what it was given: gate 1 is the output, to the bit, and 0 the input."""

    def __init__(self, gate: Gate, point: GatePoint):
        self.gate, self.point = gate, point

    def attach(self, module: nn.Module):
        # Forward parameters by position: gradient checkpointing passes positionally what the host passes by keyword.
        self.parameters = tuple(inspect.signature(type(module).forward).parameters)[1:]
        return module.register_forward_hook(self.hook, with_kwargs=True)

    def hook(self, module: nn.Module, inputs: tuple, kwargs: dict, output):
        given = {**dict(zip(self.parameters, inputs)), **kwargs}  # torch 2.7 compiles no `|` of dictionaries
        if isinstance(output, tuple):
            blended = [self._blend(given[name], item, module) for name, item in zip(self.point.blend, output)]
            return (*blended, *output[len(blended) :])
        return self._blend(given[self.point.blend[0]], output, module)

    def _blend(self, start: Tensor, end: Tensor | None, module: nn.Module):
        if end is None:
            return None
        return torch.lerp(start, end, self.gate.features(end, self.point, module).expand_as(end))


def _hook_of(gate: Gate, point: GatePoint) -> GatedInput | GatedOutput | BlendedOutput:
    if point.blend:
        return BlendedOutput(gate, point)
    return GatedInput(gate, point) if point.side == "input" else GatedOutput(gate, point)


class GateHandle:
    """The gates on a model: read and set them by site name; `remove()` or leaving the `with` block takes them off.

    Gates are no parameters of the model: `.to()`, `state_dict()`, DDP and FSDP do not see them. Give
    `handle.values()` to an optimiser yourself.
    """

    def __init__(self, model: nn.Module, gates: dict[str, Gate], hooks: list):
        self.model, self.gates, self._hooks = model, gates, hooks

    def __getitem__(self, name: str) -> Tensor:
        return self.gates[name].value

    def __setitem__(self, name: str, value: Tensor) -> None:
        gate = self.gates[name]
        gate.value = _checked(gate.site, value)

    def __iter__(self):
        return iter(self.gates)

    def values(self) -> list[Tensor]:
        return [gate.value for gate in self.gates.values()]

    def remove(self) -> None:
        """Take every hook off; the model is as it was, to the bit."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> GateHandle:
        return self

    def __exit__(self, *error) -> None:
        self.remove()


def _checked(site: Site, value: Tensor) -> Tensor:
    fits = isinstance(value, Tensor) and value.ndim in (1, 2) and value.shape[-1] == site.size
    if not fits or not value.is_floating_point():
        found = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise PlanMismatch(
            f"the gate of '{site.name}' is {found}; expected a float tensor of shape ({site.size},) or "
            f"(rows, {site.size})."
        )
    return value


def attach_gates(
    target, gates: PruningPlan | str | os.PathLike | Mapping[str, Tensor], sites: Sites | None = None
) -> GateHandle:
    """Gate a model's sites by hooks, in place; nothing else of the model changes.

    Args:
        target: a supported model or a pipeline.
        gates: site name -> float tensor of shape `(size,)` or `(rows, size)`, 1 keeps and 0 removes; or a plan
            or the path of one, which is attached as zeros and ones, and its operators in place of what they replace.
        sites: what `find_sites(target)` returned, when at hand.

    Returns:
        A `GateHandle`; also a context manager.

    Operators are in the dtype and on the device that their place has now: attach them after `.to()`.

    Raises:
        NoMatchingSites: a name is no site of the model. PlanMismatch: a gate has the wrong shape or dtype, `gates` is
        neither gates nor a plan, or an operator of a joined plan stands at a layer that the plan narrows first.
    """
    model = denoiser(target)
    sites = find_sites(model) if sites is None else sites
    operators = {}
    if not isinstance(gates, Mapping):
        plan = as_plan(gates)
        gates = {name: mask.float() for name, mask in plan.keep.items()}
        operators = _operator_outputs(model, sites, plan)
    held = {name: Gate(sites[name], _checked(sites[name], value)) for name, value in gates.items()}
    hooks = []
    try:
        for path, operator in operators.items():
            hooks.append(operator.attach(model.get_submodule(path)))
        for gate in held.values():
            for point in gate.site.gates:
                hooks.append(_hook_of(gate, point).attach(model.get_submodule(point.module)))
    except BaseException:
        for hook in hooks:
            hook.remove()
        raise
    return GateHandle(model, held, hooks)


def _operator_outputs(model: nn.Module, sites: Sites, plan: PruningPlan) -> dict[str, OperatorOutput]:
    """Module path -> what returns the output of the plan's operator there. Raises `PlanMismatch`."""
    check_form(plan.ops)
    keep = {name: mask for name, mask in plan.keep.items() if name in sites}
    partly = {name: mask for name, mask in keep.items() if mask.any() and not mask.all()}
    narrowed = {piece.module for name in partly for piece in sites[name].slices}
    found, paths = {}, dict(model.named_modules())
    for op in effective_ops(plan.ops, sites, keep):
        path = op["path"]
        check_path(op, paths, type(model).__name__)
        if path in narrowed:
            raise PlanMismatch(
                f"the plan narrows '{path}' and then puts '{op['with']}' there, fitted on the narrow layer; expected "
                "an operator of the layer as it is here. Cut a copy instead: gp.cut(copy.deepcopy(model), plan)."
            )
        removed = model.get_submodule(path)
        found[path] = OperatorOutput(beside(operator_of(op, plan.tensors, removed), removed, model))
    return found


def gated_sites(model: nn.Module) -> list[str]:
    """Names of the sites that gates are attached to at this moment, and of operators that stand in."""
    found = {}
    for module in model.modules():
        for hook in [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]:
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, (GatedInput, GatedOutput, BlendedOutput)):
                found[owner.gate.site.name] = None
            elif isinstance(owner, OperatorOutput):
                found[f"operator '{owner.operator.name}'"] = None
    return list(found)
