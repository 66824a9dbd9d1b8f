"""timm's `VisionTransformer` (ViT, DeiT, DINOv2, SigLIP, CLIP towers, ...) with the blocks that can be cut exactly."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genprune.errors import UnsupportedModel
from genprune.families import Family, OperatingPoint, StockExport, renumbered
from genprune.replacements import PassThrough, Tombstone, ZeroOutput
from genprune.sites import GatePoint, Replacement, Site, Sites, SizeAttribute, Slice, effective_keep


class EmptiedViTAttention(Tombstone):
    """A timm attention without heads: its output bias at every token."""

    @classmethod
    def of(cls, removed: nn.Module) -> EmptiedViTAttention:
        module = cls()
        module.bury(removed, keep=("proj.bias",))
        if removed.proj.bias is not None:
            module.proj.bias = removed.proj.bias
        return module

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        output = hidden_states.new_zeros(()).expand(hidden_states.shape)  # (B, N, C)
        bias = getattr(self.proj, "bias", None)
        return output if bias is None else output + bias


def forward_owner(module: nn.Module) -> str:
    """Name of the class whose `forward` the module runs; empty where that class is not timm's.

    A subclass that overrides `forward` may use its layers in another way, so that what is exact for the parent is not
    for it; one that only changes the constructor is as good as the parent.
    """
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return owner.__name__ if owner.__module__.startswith("timm.") else ""


def _norm_between(path: str, module: nn.Module) -> str | None:
    """Why hidden units cannot go one by one where the module normalises across them, or None."""
    norm = getattr(module, "norm", None)
    if norm is None or isinstance(norm, nn.Identity):
        return None
    return (
        f"'{path}.norm' ({type(norm).__name__}) stands between its units and their consumer: the others would change"
    )


def head_site(path: str, attention: nn.Module, parent: str | None) -> Site | str:
    """The heads of one timm attention, or the reason why they cannot go one by one."""
    kind = forward_owner(attention)
    if kind not in ("Attention", "AttentionRope"):
        return f"its heads are computed by {type(attention).__name__}; exact are timm's Attention and AttentionRope"
    if reason := _norm_between(path, attention):
        return reason
    if getattr(attention, "num_kv_groups", 1) != 1:
        return f"{attention.num_kv_heads} key heads are shared by {attention.num_heads} query heads"
    head_dim, width = attention.head_dim, attention.attn_dim
    if attention.qkv is not None:  # rows are [q | k | v]
        rows = [Slice(f"{path}.qkv", "out", offset=part * width, width=head_dim) for part in range(3)]
    else:
        rows = [Slice(f"{path}.{name}", "out", width=head_dim) for name in ("q_proj", "k_proj", "v_proj")]
    if getattr(attention, "gate", None) is not None:  # a sigmoid per feature of the attention's output
        rows.append(Slice(f"{path}.gate", "out", width=head_dim))
    numbers = [SizeAttribute(path, "num_heads"), SizeAttribute(path, "attn_dim", head_dim)]
    if kind == "AttentionRope":
        numbers += [SizeAttribute(path, "num_kv_heads"), SizeAttribute(path, "kv_dim", head_dim)]
    return Site(
        path=path,
        kind="heads",
        size=attention.num_heads,
        gates=(GatePoint(f"{path}.proj", width=head_dim),),
        slices=(*rows, Slice(f"{path}.proj", "in", width=head_dim)),
        attributes=tuple(numbers),
        emptied=(Replacement(path, EmptiedViTAttention.of),),
        parent=parent,
        attention=path,
    )


def neuron_site(path: str, mlp: nn.Module, parent: str | None) -> Site | str:
    """The hidden neurons of one timm MLP, or the reason why they cannot go one by one."""
    kind = forward_owner(mlp)
    if kind not in ("Mlp", "GluMlp", "SwiGLU") or not isinstance(mlp.fc2, nn.Linear):
        return f"its neurons are computed by {type(mlp).__name__}; exact are timm's Mlp, GluMlp and SwiGLU on tokens"
    if reason := _norm_between(path, mlp):
        return reason
    hidden = mlp.fc2.in_features
    if kind == "SwiGLU":
        rows = [Slice(f"{path}.{name}", "out") for name in ("fc1_g", "fc1_x")]
    else:  # GluMlp packs values and gates in halves
        rows = [Slice(f"{path}.fc1", "out", offset=half * hidden) for half in range(2 if kind == "GluMlp" else 1)]
    return Site(
        path=path,
        kind="neurons",
        size=hidden,
        gates=(GatePoint(f"{path}.fc2"),),
        slices=(*rows, Slice(f"{path}.fc2", "in")),
        parent=parent,
    )


# Block class -> its two branches: sub-layer, what scales it (the branch's last module), the norm before it if any.
_BRANCHES = {
    "Block": (("attn", "ls1", "norm1"), ("mlp", "ls2", "norm2")),
    "ResPostBlock": (("attn", "norm1", None), ("mlp", "norm2", None)),
}


def block_sites(path: str, block: nn.Module) -> tuple[list[Site], dict[str, str]]:
    """Sites of one block, and what of it is refused: site name -> reason."""
    branches = _BRANCHES.get(forward_owner(block))
    if branches is None:
        known = " and ".join(_BRANCHES)
        return [], {f"{path}:block": f"it is a {type(block).__name__}; exact are timm's {known}"}
    whole = Site(
        path=path,
        kind="block",
        size=1,
        gates=(GatePoint(path, side="output", width=0, blend=("x",)),),
        emptied=(Replacement(path, PassThrough.of),),
    )
    sites, refused = [], {}
    for name, last, norm in branches:
        inner = f"{path}.{name}"
        if isinstance(getattr(block, name), Tombstone):
            continue
        # After a post-norm a zero is its bias: there the norm returns the zeros. LayerScale keeps a zero.
        emptied = [Replacement(inner, ZeroOutput.of)]
        if norm is None:
            emptied.append(Replacement(f"{path}.{last}", ZeroOutput.of))
        else:
            emptied += [Replacement(f"{path}.{last}", PassThrough.of), Replacement(f"{path}.{norm}", PassThrough.of)]
        branch = Site(
            path=inner,
            kind="branch",
            size=1,
            gates=(GatePoint(f"{path}.{last}", side="output", width=0),),
            emptied=tuple(emptied),
            parent=whole.name,
        )
        units = (head_site if name == "attn" else neuron_site)(inner, getattr(block, name), branch.name)
        if isinstance(units, Site):
            sites.append(units)
        else:
            refused[f"{inner}:{'heads' if name == 'attn' else 'neurons'}"] = units
        sites.append(branch)
    return [*sites, whole], refused


# ---- a timm model's configuration as JSON ---------------------------------------------------------------------------


def _as_json(value: Any) -> Any:
    """A constructor argument as JSON: classes and functions by import path, anything without a name by its type."""
    if isinstance(value, functools.partial):
        return {"partial": _as_json(value.func), "keywords": _as_json(value.keywords)}
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}:{value.__qualname__}"
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    # No `repr`: it may hold an address, which differs from run to run.
    plain = value is None or isinstance(value, (bool, int, float, str))
    return value if plain else f"<{type(value).__name__}>"


def _from_json(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(name, item) for item in value)
    if isinstance(value, dict):
        value = {key: _from_json(name, item) for key, item in value.items()}
        return functools.partial(value["partial"], **value["keywords"]) if "partial" in value else value
    if not isinstance(value, str):
        return value
    if found := re.fullmatch(r"((?:timm|torch\.nn)[\w.]*):(\w+)", value):
        layer = getattr(importlib.import_module(found[1]), found[2], None)
        if isinstance(layer, type) and issubclass(layer, nn.Module):  # the file may come from anybody
            return layer
    if value.startswith("<") or ":" in value:
        raise UnsupportedModel(
            f"the model was built with {name}={value}, which genprune does not import; expected a name, a number, or "
            "a class of timm or torch.nn. Build it with timm.create_model and such arguments."
        )
    return value


class ViTFamily(Family):
    """Sites of a timm ViT. Operating point: the image size that the model was built for, in pixels."""

    def sites(self, model: nn.Module) -> list[Site]:
        return [site for found, _ in self._blocks(model) for site in found]

    def refused(self, model: nn.Module) -> dict[str, str]:
        return {name: reason for _, refused in self._blocks(model) for name, reason in refused.items()}

    def _blocks(self, model: nn.Module) -> list[tuple[list[Site], dict[str, str]]]:
        blocks = enumerate(model.blocks)
        return [block_sites(f"blocks.{i}", block) for i, block in blocks if not isinstance(block, Tombstone)]

    def operating_point(self, model: nn.Module, **given: int) -> OperatingPoint:
        size = getattr(model.patch_embed, "img_size", None) or model.default_cfg["input_size"][1:]
        return OperatingPoint(**({"height": size[0], "width": size[1]} | given))

    def example_inputs(
        self, model: nn.Module, point: OperatingPoint, device: torch.device | str, dtype: torch.dtype
    ) -> dict[str, Any]:
        channels = getattr(model, "in_chans", 3)
        return {"x": torch.randn(point.batch, channels, point.height, point.width, device=device, dtype=dtype)}

    def config(self, model: nn.Module) -> dict[str, Any]:
        """`architecture` and `model_args` of `timm.create_model`, beside facts that a cut does not change."""
        described = getattr(model, "pretrained_cfg", None) or {}
        arguments = {key: _as_json(value) for key, value in getattr(model, "_model_args", {}).items()}
        # A head that was reset later, and another image size, are not among the arguments.
        arguments["num_classes"] = model.num_classes
        return {
            "architecture": described.get("architecture"),
            "model_args": arguments,
            "facts": {
                "depth": len(model.blocks),
                "embed_dim": model.embed_dim,
                "image_size": list(getattr(model.patch_embed, "img_size", None) or ()),
                "patch_size": list(model.patch_embed.patch_size) if hasattr(model.patch_embed, "patch_size") else [],
                "prefix_tokens": model.num_prefix_tokens,
            },
        }

    def build(self, config: dict[str, Any]) -> nn.Module:
        """Raises `UnsupportedModel` where the model was not made by `timm.create_model`."""
        if not config.get("architecture"):
            raise UnsupportedModel(
                "the configuration names no timm architecture, because the model was built from its class; expected a "
                "model of timm.create_model. Build it with timm.create_model(name, ...)."
            )
        import timm

        if loading := {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"} & config["model_args"].keys():
            raise UnsupportedModel(
                f"the configuration's model_args hold {sorted(loading)}; expected arguments of the architecture only, "
                "because a configuration loads no weights. Remove them from the file."
            )
        arguments = {key: _from_json(key, value) for key, value in config["model_args"].items()}
        return timm.create_model(config["architecture"], pretrained=False, **arguments)

    def stock_config(
        self, model: nn.Module, sites: Sites, keep: Mapping[str, Tensor], ops: Sequence[Mapping[str, Any]] = ()
    ) -> StockExport | None:
        keep = effective_keep(sites, keep)
        if ops:
            return None
        config, rename = self.config(model), {}
        if not config["architecture"] or {sites[name].kind for name in keep} - {"block", "neurons"}:
            return None
        gone = [f"blocks.{index}:block" in keep for index in range(len(model.blocks))]
        if any(gone):
            config["model_args"]["depth"] = config["facts"]["depth"] = gone.count(False)
            rename = renumbered("blocks", gone)
        if any(sites[name].kind == "neurons" for name in keep):
            ratio = self._uniform_ratio(model, sites, keep, gone)
            if ratio is None:
                return None
            config["model_args"]["mlp_ratio"] = ratio
        return StockExport(config, rename)

    def _uniform_ratio(self, model, sites: Sites, keep: Mapping[str, Tensor], gone: list[bool]) -> float | None:
        """The `mlp_ratio` that gives every kept block the width that is left, or None where widths differ."""
        widths = set()
        for index, is_gone in enumerate(gone):
            name = f"blocks.{index}.mlp:neurons"
            if is_gone:
                continue
            if name not in sites:
                return None
            packed = 2 if len(sites[name].slices) == 3 and sites[name].slices[1].offset else 1  # GluMlp counts both
            widths.add(packed * (int(keep[name].sum()) if name in keep else sites[name].size))
        if len(widths) != 1 or 0 in widths:
            return None
        width = widths.pop()
        ratio = width / model.embed_dim  # timm: int(embed_dim * mlp_ratio)
        return ratio if int(model.embed_dim * ratio) == width else (width + 0.5) / model.embed_dim


FAMILIES = (ViTFamily("vit", ("VisionTransformer",), "timm", "x"),)
