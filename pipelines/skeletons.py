"""An expert without weights: the cut model's modules, and from where in the dense model each of its tensors comes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from genprune.cutting import cut, layer_masks
from genprune.errors import UnsupportedModel
from genprune.families import find_sites
from genprune.plan import PruningPlan
from genprune.replacements import ScatteredLinear
from genprune.sites import effective_keep


@dataclass(frozen=True)
class Source:
    """Where a parameter of a cut model comes from.

    Args:
        module, name: where it stands in the cut model.
        full: its name in the dense model and in the cut one.
        rows, columns: what the cut keeps of it, bool; None: everything.
        shape: in the cut model.
    """

    module: nn.Module
    name: str
    full: str
    rows: Tensor | None
    columns: Tensor | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Skeleton:
    """A cut model whose parameters are on the meta device.

    Args:
        model: of the class that `gp.cut` gives, with its heads, groups and replacements.
        sources: one for each parameter.
        shared: (module, buffer name, full name) of the buffers that are the dense model's own.
        own: (module, buffer name) of those that the cut made: indices, and zero-element placeholders.
    """

    model: nn.Module
    sources: tuple[Source, ...] = field(repr=False)
    shared: tuple[tuple[nn.Module, str, str], ...] = field(repr=False)
    own: tuple[tuple[nn.Module, str], ...] = field(repr=False)

    def link_buffers_(self, dense: nn.Module, like: Tensor) -> None:
        """Take the buffers that the dense model has now; those of the cut follow the device and dtype of `like`."""
        buffers = dict(dense.named_buffers(remove_duplicate=False))
        for module, name, full in self.shared:
            module._buffers[name] = buffers[full]
        for module, name in self.own:
            buffer = module._buffers[name]
            dtype = like.dtype if buffer.is_floating_point() else buffer.dtype
            module._buffers[name] = buffer.to(like.device, dtype)

    def empty_(self) -> None:
        """Put meta tensors where the parameters are."""
        for source in self.sources:
            old = source.module._parameters[source.name]
            if not old.is_meta:
                empty = torch.empty(source.shape, dtype=old.dtype, device="meta")
                source.module._parameters[source.name] = nn.Parameter(empty, requires_grad=old.requires_grad)


def skeleton_of(model: nn.Module, plan: PruningPlan) -> Skeleton:
    """What `gp.cut` makes of a copy of the model, without weights. The plan was checked before, and has no `ops`.

    Raises:
        UnsupportedModel: a tensor of the cut model is no selection of the dense model's of the same name.
    """
    sites = find_sites(model)
    masks = layer_masks(model, sites, effective_keep(sites, plan.keep))
    small = _without_weights(model)
    with torch.device("cpu"):  # masks and indices hold values
        cut(small, plan)
        _restore_indices_(model, small, masks)
    dense = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    sources, shared, own = [], [], []
    for path, module in small.named_modules():
        for name, value in module._parameters.items():
            if value is not None:
                full = f"{path}.{name}".lstrip(".")
                sources.append(_source(module, name, full, value, dense.get(full), masks, path))
        for name, value in module._buffers.items():
            full = f"{path}.{name}".lstrip(".")
            if value is not None and value is buffers.get(full):
                shared.append((module, name, full))
            elif value is not None:
                if value.is_meta:  # a placeholder: it has no elements
                    module._buffers[name] = torch.empty(value.shape, dtype=value.dtype)
                own.append((module, name))
    return Skeleton(small, tuple(sources), tuple(shared), tuple(own))


def _without_weights(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters are empty, on the meta device, and whose buffers are the model's own tensors."""
    memo: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    if "_genprune_plan" in model.__dict__:
        memo[id(model._genprune_plan)] = model._genprune_plan
    return copy.deepcopy(model, memo)


def _restore_indices_(dense: nn.Module, small: nn.Module, masks: Mapping[tuple[str, str], Tensor]) -> None:
    """The cut puts a scattered layer's index where its weight is: on the meta device, without values."""
    for path, module in small.named_modules():
        if isinstance(module, ScatteredLinear) and (mask := masks.get((path, "out"))) is not None:
            before = dense.get_submodule(path)
            kept = mask.nonzero().flatten().to(before.weight.device)
            module.index = before.index[kept] if isinstance(before, ScatteredLinear) else kept


def _source(
    module: nn.Module,
    name: str,
    full: str,
    value: Tensor,
    dense: Tensor | None,
    masks: Mapping[tuple[str, str], Tensor],
    path: str,
) -> Source:
    rows, columns = masks.get((path, "out")), masks.get((path, "in")) if name == "weight" else None
    expected = None if dense is None else list(dense.shape)
    if expected is not None:
        for axis, mask in ((0, rows), (1, columns)):
            if mask is not None:
                expected[axis] = int(mask.sum())
    if expected != list(value.shape):
        raise UnsupportedModel(
            f"'{full}' has shape {tuple(value.shape)} after the cut, which is no selection of the dense model's "
            f"{None if dense is None else tuple(dense.shape)}; expected one. Use MaterialisedStore for this model."
        )
    return Source(module, name, full, rows, columns, tuple(value.shape))


def cut_copy(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """`gp.cut` of a copy, with weights of its own; the model is not touched. The plan was checked before.

    Without `ops` memory peaks at the copy's own size beside the model; with them a whole copy is cut.
    """
    if plan.ops:
        return cut(copy.deepcopy(model), plan)
    skeleton, dense = skeleton_of(model, plan), dict(model.named_parameters(remove_duplicate=False))
    for source in skeleton.sources:
        old = dense[source.full]
        kept = _selected(_selected(old.detach(), 0, source.rows), 1, source.columns)
        if source.rows is None and source.columns is None:
            kept = kept.clone()
        source.module._parameters[source.name] = nn.Parameter(kept, requires_grad=old.requires_grad)
    skeleton.link_buffers_(model, next(iter(dense.values())))
    for module, name, _ in skeleton.shared:
        module._buffers[name] = module._buffers[name].clone()
    return skeleton.model


def _selected(value: Tensor, axis: int, mask: Tensor | None) -> Tensor:
    return value if mask is None else value.index_select(axis, mask.nonzero().flatten().to(value.device))
