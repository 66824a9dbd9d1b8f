"""`FluxTransformer2DModel` and `SD3Transformer2DModel`: text and image streams that meet in attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genprune.families import OperatingPoint, StockExport, renumbered
from genprune.families.attention import (
    attention_heads,
    check_attention,
    feed_forward_neurons,
    head_numbers,
    head_projections,
    residual_branch,
)
from genprune.families.diffusers_family import DiffusersFamily
from genprune.replacements import Tombstone
from genprune.sites import GatePoint, Replacement, Site, Sites, SizeAttribute, Slice, effective_keep


class PassThroughPair(Tombstone):
    """A removed block of two streams: returns them as they came, in the host's order (text, image)."""

    @classmethod
    def of(cls, removed: nn.Module) -> PassThroughPair:
        module = cls()
        module.bury(removed)
        if hasattr(removed, "context_pre_only"):
            module.context_pre_only = removed.context_pre_only  # SD3's loop reads it where a ControlNet is at work
        return module

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return encoder_hidden_states, hidden_states


class ZeroWidthAttention(Tombstone):
    """The attention of a single-stream block without heads: no features, which `proj_out` has no columns for."""

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states[..., :0]  # (B, N, 0)


def whole_block(path: str) -> Site:
    """One block of two streams; removed, it hands both on."""
    return Site(
        path=path,
        kind="block",
        size=1,
        gates=(GatePoint(path, side="output", width=0, blend=("encoder_hidden_states", "hidden_states")),),
        emptied=(Replacement(path, PassThroughPair.of),),
    )


# Adaptive norm class -> chunks of its linear's output: each holds one of the shifts, scales and gates.
_CHUNKS = {
    "AdaLayerNormZero": 6,
    "SD35AdaLayerNormZeroX": 9,
    "AdaLayerNormZeroSingle": 3,
    "AdaLayerNormContinuous": 2,
}


def modulation_channels(path: str, norm: nn.Module, parent: str | None) -> Site:
    """The channels that an adaptive norm modulates: unit `u` is its shift, scale and gate in every chunk."""
    chunks = _CHUNKS[type(norm).__name__]
    linear, size = f"{path}.linear", norm.linear.out_features // chunks
    return Site(
        path=path,
        kind="modulation",
        size=size,
        gates=tuple(GatePoint(linear, side="output", offset=chunk * size) for chunk in range(chunks)),
        slices=tuple(Slice(linear, "out", offset=chunk * size, scatter=True) for chunk in range(chunks)),
        parent=parent,
    )


def double_block_sites(path: str, block: nn.Module) -> list[Site]:
    """Sites of a block with a text and an image stream: `FluxTransformerBlock`, SD3's `JointTransformerBlock`."""
    # SD3's last block ends the text stream, which its host takes as None: it cannot be skipped as a whole.
    whole = None if getattr(block, "context_pre_only", False) else whole_block(path)
    parent = whole.name if whole else None
    sites = [
        modulation_channels(f"{path}.{name}", getattr(block, name), parent) for name in ("norm1", "norm1_context")
    ]
    for name in ("attn", "attn2"):  # SD3.5 has a second attention, of the image stream alone
        if (attention := getattr(block, name, None)) is None or isinstance(attention, Tombstone):
            continue
        branch = residual_branch(f"{path}.{name}", parent, joint=name == "attn")
        sites += [attention_heads(f"{path}.{name}", attention, branch.name, joint=name == "attn"), branch]
    for name in ("ff", "ff_context"):
        if (feed_forward := getattr(block, name, None)) is None or isinstance(feed_forward, Tombstone):
            continue
        branch = residual_branch(f"{path}.{name}", parent)
        sites += [site for site in (feed_forward_neurons(f"{path}.{name}", feed_forward, branch.name),) if site]
        sites.append(branch)
    return [*sites, whole] if whole else sites


def single_block_sites(path: str, block: nn.Module) -> list[Site]:
    """Sites of a `FluxSingleTransformerBlock`, whose `proj_out` reads `[attention | MLP]`."""
    whole = whole_block(path)
    sites = [modulation_channels(f"{path}.norm", block.norm, whole.name)]
    # Tensor parallelism reads the two widths of the packed input from a list on the layer.
    packed = "_tp_packed_row_blocks" if hasattr(block.proj_out, "_tp_packed_row_blocks") else None
    attention_width = 0
    if not isinstance(block.attn, Tombstone):
        check_attention(f"{path}.attn", block.attn)
        attention_width = block.attn.to_q.out_features
        head_dim = attention_width // block.attn.heads
        numbers = head_numbers(f"{path}.attn", block.attn, "out_dim")
        if packed:
            numbers += (SizeAttribute(f"{path}.proj_out", packed, head_dim, item=0),)
        sites.append(
            Site(
                path=f"{path}.attn",
                kind="heads",
                size=block.attn.heads,
                gates=(GatePoint(f"{path}.proj_out", width=head_dim),),
                slices=(
                    *head_projections(f"{path}.attn", block.attn),
                    Slice(f"{path}.proj_out", "in", width=head_dim),
                ),
                attributes=numbers,
                emptied=(Replacement(f"{path}.attn", ZeroWidthAttention.of),),
                parent=whole.name,
                attention=f"{path}.attn",
            )
        )
    numbers = (SizeAttribute(path, "mlp_hidden_dim"),)
    if packed:
        numbers += (SizeAttribute(f"{path}.proj_out", packed, item=1),)
    neurons = Site(
        path=f"{path}.proj_mlp",
        kind="neurons",
        size=block.proj_mlp.out_features,
        gates=(GatePoint(f"{path}.proj_out", offset=attention_width),),
        slices=(Slice(f"{path}.proj_mlp", "out"), Slice(f"{path}.proj_out", "in", offset=attention_width)),
        attributes=numbers,
        parent=whole.name,
    )
    return [*sites, neurons, whole]


class MMDiTFamily(DiffusersFamily):
    """What Flux and SD3 share. `depths` names their block lists and the configuration field that counts each."""

    depths: tuple[tuple[str, str], ...] = ()

    def stock_config(
        self, model: nn.Module, sites: Sites, keep: Mapping[str, Tensor], ops: Sequence[Mapping[str, Any]] = ()
    ) -> StockExport | None:
        keep = effective_keep(sites, keep)
        if ops:
            return None
        if any(sites[name].kind != "block" for name in keep):
            return None  # a stock configuration has one width for all blocks
        config, rename = self.config(model), {}
        for path, count in self.depths:
            gone = [f"{path}.{index}:block" in keep for index in range(len(model.get_submodule(path)))]
            config[count] = gone.count(False)
            rename |= renumbered(path, gone)
            self._renumber_config(config, gone)
        return StockExport(config, rename)

    def _renumber_config(self, config: dict[str, Any], gone: list[bool]) -> None:
        """Fields of the configuration that name blocks by number."""


class FluxFamily(MMDiTFamily):
    """Sites of Flux. Operating point: 1024 px (128x128 latent pixels, packed 2x2: 4096 tokens), 512 text tokens."""

    depths = (("transformer_blocks", "num_layers"), ("single_transformer_blocks", "num_single_layers"))

    def sites(self, model: nn.Module) -> list[Site]:
        sites: list[Site] = []
        for index, block in enumerate(model.transformer_blocks):
            if not isinstance(block, Tombstone):
                sites += double_block_sites(f"transformer_blocks.{index}", block)
        for index, block in enumerate(model.single_transformer_blocks):
            if not isinstance(block, Tombstone):
                sites += single_block_sites(f"single_transformer_blocks.{index}", block)
        return sites

    def operating_point(self, model: nn.Module, **given: int) -> OperatingPoint:
        return OperatingPoint(**({"height": 128, "width": 128, "text_length": 512} | given))

    def example_inputs(
        self, model: nn.Module, point: OperatingPoint, device: torch.device | str, dtype: torch.dtype
    ) -> dict[str, Any]:
        config, make = model.config, {"device": device, "dtype": dtype}
        rows, columns, axes = point.height // 2, point.width // 2, len(config.axes_dims_rope)
        image_ids = torch.zeros(rows, columns, axes, **make)  # last two axes: row and column of the token
        image_ids[..., -2] += torch.arange(rows, **make)[:, None]
        image_ids[..., -1] += torch.arange(columns, **make)[None, :]
        inputs = {
            "hidden_states": torch.randn(point.batch, rows * columns, config.in_channels, **make),
            "encoder_hidden_states": torch.randn(point.batch, point.text_length, config.joint_attention_dim, **make),
            "pooled_projections": torch.randn(point.batch, config.pooled_projection_dim, **make),
            "timestep": torch.full((point.batch,), 0.5, **make),
            "img_ids": image_ids.reshape(rows * columns, axes),
            "txt_ids": torch.zeros(point.text_length, axes, **make),
        }
        if config.guidance_embeds:
            inputs["guidance"] = torch.full((point.batch,), 3.5, **make)
        return inputs


class SD3Family(MMDiTFamily):
    """Sites of SD3 and SD3.5. Operating point: the model's `sample_size` (128: 1024 px), 77 CLIP + 256 T5 tokens."""

    depths = (("transformer_blocks", "num_layers"),)

    def sites(self, model: nn.Module) -> list[Site]:
        sites: list[Site] = []
        for index, block in enumerate(model.transformer_blocks):
            if not isinstance(block, Tombstone):
                sites += double_block_sites(f"transformer_blocks.{index}", block)
        return sites

    def operating_point(self, model: nn.Module, **given: int) -> OperatingPoint:
        size = model.config.sample_size
        return OperatingPoint(**({"height": size, "width": size, "text_length": 77 + 256} | given))

    def example_inputs(
        self, model: nn.Module, point: OperatingPoint, device: torch.device | str, dtype: torch.dtype
    ) -> dict[str, Any]:
        config, make = model.config, {"device": device, "dtype": dtype}
        return {
            "hidden_states": torch.randn(point.batch, config.in_channels, point.height, point.width, **make),
            "encoder_hidden_states": torch.randn(point.batch, point.text_length, config.joint_attention_dim, **make),
            "pooled_projections": torch.randn(point.batch, config.pooled_projection_dim, **make),
            "timestep": torch.full((point.batch,), 500, device=device),
        }

    def _renumber_config(self, config: dict[str, Any], gone: list[bool]) -> None:
        kept = [index for index, is_gone in enumerate(gone) if not is_gone]
        config["dual_attention_layers"] = [i for i, old in enumerate(kept) if old in config["dual_attention_layers"]]


FAMILIES = (
    FluxFamily("flux", ("FluxTransformer2DModel",), "diffusers", "hidden_states", neighbours=2, first_blocks=1),
    SD3Family("sd3", ("SD3Transformer2DModel",), "diffusers", "hidden_states", neighbours=2, first_blocks=1),
)
