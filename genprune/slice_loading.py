"""Cut while loading: only what a plan keeps is read from the checkpoint, so that the dense model never exists."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from genprune.cutting import check_plan, cut, layer_masks
from genprune.errors import PlanMismatch
from genprune.families import find_sites
from genprune.plan import PLAN_FILE, PruningPlan
from genprune.replacements import Tombstone
from genprune.saving import damage_named, model_class, read_config
from genprune.sites import effective_keep
from genprune.widths import attach_saved_plan_, skeleton

_WEIGHTS = "diffusion_pytorch_model"  # diffusers' name for a model's checkpoint
# A file is mapped anew after this many numbers: the pages that were read count as memory until it is unmapped.
_REMAP_ELEMENTS = 2**22


def load_cut(
    folder: Path,
    plan: PruningPlan,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """What `gp.cut` makes of the diffusers model in `folder`, to the bit, at about the memory of the pruned model.

    Args:
        folder: a diffusers model's folder with safetensors weights, dense or pruned before.
        plan: checked against the configuration before any weight is read.
        dtype: of the floating-point weights; default float32, as in `from_pretrained`.
        variant: such as `"fp16"`, as in `from_pretrained`.
        device: where the weights are put.

    Raises:
        PlanMismatch: the plan is for another model, or the folder is half-written or holds no safetensors.
    """
    config = read_config(folder)
    cls = model_class(config, folder)
    with _default_dtype(dtype), damage_named(folder, cls.__name__):
        model = skeleton(cls.from_config, config)
    attach_saved_plan_(model, config, folder / PLAN_FILE)
    sites = find_sites(model)
    check_plan(model, plan, sites)
    files = _tensor_files(folder, variant)
    names = _names_on_disk(model, files)
    masks = layer_masks(model, sites, effective_keep(sites, plan.keep))
    cut(model, plan)
    fill = _Fill(files, names, masks, dtype, tuple(cls._keep_in_fp32_modules or ()), device)
    fill.all_of_(model)
    model.register_to_config(_name_or_path=str(folder))
    return model.to(device).eval()  # buffers that no file holds


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _tensor_files(folder: Path, variant: str | None) -> dict[str, Path]:
    """Tensor name on disk -> the file that holds it, for one file or for shards."""
    infix = f".{variant}" if variant else ""
    whole = folder / f"{_WEIGHTS}{infix}.safetensors"
    index = folder / f"{_WEIGHTS}.safetensors.index{infix}.json"
    again = "Load the model with from_pretrained and save it again with save_pretrained."
    if index.is_file():
        try:
            files = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, AttributeError) as error:
            raise PlanMismatch(f"'{index}' is not a whole index of shards ({error!r}). {again}") from None
    elif whole.is_file():
        with _opened(whole) as file:
            files = dict.fromkeys(file.keys(), whole)
    else:
        raise PlanMismatch(f"'{folder}' has neither {whole.name} nor {index.name}; expected safetensors. {again}")
    for path in sorted(set(files.values())):
        if not path.is_file():
            raise PlanMismatch(f"the shard '{path}' is missing: the folder is half-written. {again}")
    return files


@contextmanager
def _opened(path: Path) -> Iterator:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise PlanMismatch(f"'{path}' is not a whole safetensors file ({error}). Fetch or save it again.") from None
    with file:
        yield file


def _names_on_disk(model: nn.Module, files: Mapping[str, Path]) -> dict[str, str]:
    """State-dict name -> name on disk; they differ in old checkpoints, which diffusers renames as it loads."""
    names = {name: name for name in files}
    if len(set(files.values())) == 1:  # as in diffusers: not for shards, which are younger than the renaming
        model._fix_state_dict_keys_on_load(names)
    return names


@dataclass(frozen=True)
class _Fill:
    """Reads what is kept of each tensor into a cut skeleton.

    Args:
        files: tensor name on disk -> file.
        names: state-dict name -> tensor name on disk.
        masks: what `layer_masks` gave for the model before the cut.
        dtype, in_float32: the requested dtype, and the parts of a name that stay in float32 then.
        device: where tensors are put.
    """

    files: Mapping[str, Path]
    names: Mapping[str, str]
    masks: Mapping[tuple[str, str], Tensor]
    dtype: torch.dtype | None
    in_float32: tuple[str, ...]
    device: torch.device | str

    def all_of_(self, model: nn.Module) -> None:
        by_file: dict[Path, list[tuple[nn.Module, str, str]]] = {}
        for path, module in model.named_modules():
            stored = module._buffers.keys() - module._non_persistent_buffers_set
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None or (name in module._buffers and name not in stored):
                    continue
                full = f"{path}.{name}".lstrip(".")
                if isinstance(module, Tombstone) and name in module._buffers:
                    self._put(module, name, torch.empty(0, dtype=tensor.dtype))
                elif self.names.get(full) in self.files:
                    by_file.setdefault(self.files[self.names[full]], []).append((module, path, name))
                elif name == "index" and (path, "out") in self.masks:  # of a layer that this cut scatters
                    self._put(module, name, self.masks[path, "out"].nonzero().flatten())
                elif not tensor.is_meta:  # of an operator, from the plan
                    self._put(module, name, tensor.detach().to(self.dtype or tensor.dtype))
                else:
                    raise PlanMismatch(
                        f"the checkpoint has no '{full}'; expected every tensor of {type(model).__name__}. The folder "
                        "is half-written or of another model: save it again with save_pretrained."
                    )
        for file, wanted in by_file.items():
            self._from_file(file, wanted)

    def _from_file(self, path: Path, wanted: list[tuple[nn.Module, str, str]]) -> None:
        while wanted:
            with _opened(path) as file:
                mapped = 0
                while wanted and mapped < _REMAP_ELEMENTS:
                    module, inside, name = wanted.pop()
                    source = file.get_slice(self.names[f"{inside}.{name}".lstrip(".")])
                    mapped += math.prod(source.get_shape())
                    self._put(module, name, self._kept(source, inside, name, module))
                del source  # it holds the mapping

    def _kept(self, source, inside: str, name: str, module: nn.Module) -> Tensor:
        """The kept rows and columns of one stored tensor, in the dtype that `from_pretrained` would give it."""
        rows = self.masks.get((inside, "out"))
        columns = self.masks.get((inside, "in")) if name == "weight" else None
        dense = tuple(source.get_shape())
        for dim, mask in ((0, rows), (1, columns)):
            if mask is not None and (len(dense) <= dim or dense[dim] != mask.numel()):
                raise PlanMismatch(
                    f"'{inside}.{name}' has shape {dense} on disk; its config says {mask.numel()} along dimension "
                    f"{dim}. The folder is mixed from two models: save it again with save_pretrained."
                )
        value = source[...] if rows is None else source[rows.nonzero().flatten()]
        if columns is not None:
            value = value.index_select(1, columns.nonzero().flatten())
        dtype = value.dtype
        if value.is_floating_point():
            parts = f"{inside}.{name}".split(".")
            dtype = self.dtype or module._parameters.get(name, module._buffers.get(name)).dtype
            if self.dtype is not None and any(part in parts for part in self.in_float32):
                dtype = torch.float32
        # What was not selected is a view of the mapped file.
        return value.to(dtype, copy=rows is None and columns is None)

    def _put(self, module: nn.Module, name: str, value: Tensor) -> None:
        value = value.to(self.device).contiguous()
        old = module._parameters.get(name, module._buffers.get(name))
        if old.shape != value.shape:
            raise PlanMismatch(
                f"a '{name}' of {type(module).__name__} has shape {tuple(value.shape)} on disk; its config says "
                f"{tuple(old.shape)}. The folder is mixed from two models: save it again with save_pretrained."
            )
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)
        else:
            module._buffers[name] = value
