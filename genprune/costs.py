"""Exact costs: parameters and multiply-accumulates of a model, of each module, and of each site's units.

Everything is counted on the meta device: no weights are copied, and the size of the model does not matter.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

import torch
from torch import Tensor, nn

from genprune.errors import GenpruneError, UnsupportedModel, nearest
from genprune.families import OperatingPoint, denoiser, family_named, family_of, find_sites, host_name
from genprune.sites import Site, Sites


@dataclass(frozen=True)
class ModuleCosts:
    """What one module does itself, its sub-modules not included.

    Where a sub-module is also called from outside (a DiT reads its first block's embeddings once more), it counts all
    its calls, and the module around it so much less: `Costs.within` then is what runs while that module runs.
    """

    params: int
    macs: int


@dataclass(frozen=True)
class Costs:
    """Parameters and multiply-accumulates (MACs) of one forward call.

    Attributes:
        params: number of parameters; buffers are not counted.
        macs: multiply-accumulates of convolutions, linear layers and matrix products, attention included. One
            multiply-accumulate counts 1. Elementwise work, norms and biases count 0.
        operating_point: the input shape that `macs` holds at.
        modules: module path -> what that module does itself. These sum to `params` and `macs`; the root's own part
            is under the empty path.
    """

    params: int
    macs: int
    operating_point: OperatingPoint | None = None
    modules: Mapping[str, ModuleCosts] = field(default_factory=dict, repr=False, compare=False)

    def within(self, path: str) -> ModuleCosts:
        """Params and MACs of a module with everything in it; `within("")` is the whole model."""
        inside = [c for p, c in self.modules.items() if not path or p == path or p.startswith(f"{path}.")]
        return ModuleCosts(sum(c.params for c in inside), sum(c.macs for c in inside))

    def __str__(self) -> str:
        lines = [f"params {self.params:>20,}", f"MACs   {self.macs:>20,}"]
        if self.operating_point is not None:
            lines.append("at " + ", ".join(f"{k} {v}" for k, v in asdict(self.operating_point).items()))
        return "\n".join(lines)


def operating_point(target, **given: int) -> OperatingPoint:
    """The operating point of a target: its family's default, with `given` fields (height, width, ...) replaced.

    Raises:
        GenpruneError: a field is unknown or below 1.
    """
    known = [f.name for f in fields(OperatingPoint)]
    for name, value in given.items():
        if name not in known:
            raise GenpruneError(
                f"an operating point has no '{name}'{nearest(name, known)}; expected {', '.join(known)}. "
                "Pass e.g. height=64, width=64."
            )
        if not isinstance(value, int) or value < (0 if name == "text_length" else 1):
            raise GenpruneError(f"{name}={value!r} is no size; expected a whole number of at least 1.")
    model = denoiser(target)
    return family_of(model).operating_point(model, **given)


def count_costs(target, **given: int) -> Costs:
    """Exact parameters and MACs of a model or of a pipeline's denoiser; the target is not touched.

    Args:
        target: a supported model on any device (meta included), dense, cut or gated, or a diffusers pipeline.
        given: fields of the operating point to replace: `height`, `width` (in latent pixels; image pixels for a
            ViT), `text_length`, `batch`. Default: the family's.

    Returns:
        `Costs` at that operating point, with each module's own part.

    Raises:
        UnsupportedModel: no family knows the class. GenpruneError: an unknown field.
    """
    model = denoiser(target)
    return _count(meta_copy(model), operating_point(model, **given))


def dense_costs(target, **given: int) -> Costs:
    """Costs of the dense model that a target was before any cut, built on the meta device from its configuration."""
    model = denoiser(target)
    return _count(meta_copy(_dense_on_meta(model)), operating_point(model, **given))


def _dense_on_meta(model: nn.Module) -> nn.Module:
    """The dense model of the same configuration, on the meta device."""
    family = family_named(host_name(model))
    with torch.device("meta"):
        return family.build(family.config(model))


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# Where offloading (accelerate, diffusers) keeps its state and its wrapped forward on a module.
_OFFLOADING = ("_hf_hook", "_diffusers_hook", "_old_forward", "forward")


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy without weights, hooks and offloading. Floats become float32, so that mixed precisions run."""
    if any(cls.__name__ == "FSDPModule" for cls in type(model).__mro__):
        return _unsharded(model)
    memo: dict[int, object] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty(tensor.shape, dtype=dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    for module in model.modules():
        memo |= {id(module.__dict__[name]): OrderedDict() for name in _HOOKS if name in module.__dict__}
        memo |= {id(module.__dict__[name]): object() for name in _OFFLOADING if name in module.__dict__}
        if "_genprune_plan" in module.__dict__:
            memo[id(module._genprune_plan)] = module._genprune_plan
    meta = copy.deepcopy(model, memo)
    for module in meta.modules():
        for name in _OFFLOADING:
            module.__dict__.pop(name, None)
    return meta.eval()


def _unsharded(model: nn.Module) -> nn.Module:
    """What `meta_copy` gives, for a model whose weights FSDP2 split: it lets nothing of its own be copied."""
    dense = _dense_on_meta(model)
    if sum(p.numel() for p in dense.parameters()) != sum(p.numel() for p in model.parameters()):
        raise UnsupportedModel(
            f"this {host_name(model)} was pruned and then split over processes (FSDP2); expected a dense one, whose "
            "costs its configuration tells. Count before fully_shard."
        )
    return meta_copy(dense)


def _count(meta: nn.Module, point: OperatingPoint) -> Costs:
    """Costs of a model on the meta device, by running it once there."""
    from torch.utils.flop_counter import FlopCounterMode

    inputs = family_of(meta).example_inputs(meta, point, "meta", torch.float32)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        meta(**inputs)
    # FlopCounterMode counts 2 per multiply-accumulate, and a module with everything in it.
    root = type(meta).__name__
    inside = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    modules, seen, inclusive = {}, set(), {}
    for path, module in reversed(list(meta.named_modules())):  # children before parents
        params = [p for p in module._parameters.values() if p is not None and id(p) not in seen]
        seen.update(id(p) for p in params)
        children = sum(inclusive.get(f"{path}.{child}" if path else child, 0) for child, _ in module.named_children())
        # A container such as a ModuleList is never called, so that only its children were counted.
        inclusive[path] = inside.get(f"{root}.{path}", children) if path else inside.get("Global", 0)
        modules[path] = ModuleCosts(sum(p.numel() for p in params), inclusive[path] - children)
    modules = dict(reversed(modules.items()))
    return Costs(sum(c.params for c in modules.values()), inclusive[""], point, modules)


# ---- sites ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerShape:
    """Entries of one layer that sites slice: rows (`"out"`), columns (`"in"`, 0 where it has none), and costs."""

    rows: int
    columns: int
    weight: int
    bias: int
    macs: int

    def kept(self, rows: int, columns: int) -> tuple[int, int]:
        """Params and MACs with this many rows and columns left."""
        if not self.weight:  # cut to nothing before
            return self.bias, 0
        whole, share = self.rows, rows
        if self.columns:
            whole, share = whole * self.columns, share * columns
        return self.weight * share // whole + self.bias * rows // self.rows, self.macs * share // whole


@dataclass(frozen=True)
class SiteCosts:
    """Costs of any plan without cutting: a hierarchical linear model of a model's sites.

    Attributes:
        sites: the sites that it covers.
        total: costs of the model as it is.
        layers: module path -> shape of every layer that some site slices.
        emptied: site name -> (params, MACs) that go when the site is emptied by replacing modules.
    """

    sites: Sites
    total: Costs
    layers: Mapping[str, LayerShape] = field(repr=False)
    emptied: Mapping[str, tuple[int, int]] = field(repr=False)

    def predict(self, keep: Mapping[str, Tensor]) -> Costs:
        """Exact costs of the model cut by these masks (site name -> bool of shape `(size,)`)."""
        return self.predict_widths({name: int(mask.sum()) for name, mask in keep.items()})

    def predict_widths(self, widths: Mapping[str, int]) -> Costs:
        """Exact costs with `widths[name]` units left at each named site; others keep everything.

        A site inside an emptied site costs nothing whatever its own width: nested sites never count twice.
        """
        params, macs = self.total.params, self.total.macs
        gone: dict[tuple[str, str], int] = {}  # (layer, side) -> entries that go
        for name, width in widths.items():
            site = self.sites[name]
            if width == site.size or any(widths.get(above) == 0 for above in self.sites.ancestors(name)):
                continue
            replaced = width == 0 and name in self.emptied
            if replaced:
                params, macs = params - self.emptied[name][0], macs - self.emptied[name][1]
            for piece in site.slices:
                if site.shrinks(piece.module, width):
                    key = piece.module, piece.side
                    gone[key] = gone.get(key, 0) + (site.size - width) * piece.width
            if site.attention is not None and not replaced:
                matmuls = self.total.modules[site.attention].macs
                macs -= matmuls * (site.size - width) // site.size
        for path in dict.fromkeys(path for path, _ in gone):
            layer = self.layers[path]
            left = layer.kept(layer.rows - gone.get((path, "out"), 0), layer.columns - gone.get((path, "in"), 0))
            whole = layer.kept(layer.rows, layer.columns)
            params, macs = params - whole[0] + left[0], macs - whole[1] + left[1]
        return Costs(params, macs, self.total.operating_point)

    def unit(self, name: str) -> ModuleCosts:
        """What one unit of a site costs, everything inside it included."""
        left = self.predict_widths({name: self.sites[name].size - 1})
        return ModuleCosts(self.total.params - left.params, self.total.macs - left.macs)


def site_costs(
    target, point: OperatingPoint | None = None, sites: Sites | None = None, total: Costs | None = None
) -> SiteCosts:
    """What each unit of each site costs, derived from the sites' slices on the meta device.

    Args:
        target: a supported model or a pipeline; not touched.
        point: the operating point. Default: the family's.
        sites: what `find_sites(target)` returned, when at hand.
        total: of the whole model and each module, in place of what is counted: something else that modules take, such
            as time, under the name of MACs.

    Returns:
        `SiteCosts`; its `predict(masks)` equals `count_costs` of the really cut model, to the integer.

    Raises:
        UnsupportedModel: no family knows the class.
    """
    model = denoiser(target)
    meta = meta_copy(model)
    sites = find_sites(model) if sites is None else sites
    if total is None:
        total = _count(meta, operating_point(model) if point is None else point)
    paths = dict.fromkeys(piece.module for site in sites.values() for piece in site.slices)
    layers = {path: _layer_shape(meta.get_submodule(path), total.modules[path].macs) for path in paths}
    emptied = {name: _leaves(meta, site, total) for name, site in sites.items() if site.emptied}
    return SiteCosts(sites, total, layers, emptied)


def _layer_shape(layer: nn.Module, macs: int) -> LayerShape:
    weight, bias = layer.weight, getattr(layer, "bias", None)
    columns = weight.shape[1] if weight.ndim > 1 else 0
    return LayerShape(weight.shape[0], columns, weight.numel(), 0 if bias is None else bias.numel(), macs)


def _leaves(meta: nn.Module, site: Site, total: Costs) -> tuple[int, int]:
    """Params and MACs that go with the modules that an emptied site replaces, less what the replacements keep."""
    params: dict[int, int] = {}
    paths: set[str] = set()
    kept_params: set[int] = set()
    kept_modules: set[int] = set()
    for change in site.emptied:
        removed = meta.get_submodule(change.module)
        left = change.build(removed)
        params |= {id(p): p.numel() for p in removed.parameters()}
        kept_params |= {id(p) for p in left.parameters()}
        kept_modules |= {id(module) for module in left.modules()}
        for path, module in removed.named_modules(prefix=change.module):
            if id(module) not in kept_modules:
                paths.add(path)
    macs = sum(total.modules[path].macs for path in paths)
    return sum(n for key, n in params.items() if key not in kept_params), macs
