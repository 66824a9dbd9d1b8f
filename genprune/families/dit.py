"""`DiTTransformer2DModel` and `PixArtTransformer2DModel`: one image stream, modulated by AdaLN-zero or AdaLN-single.

Blocks are `BasicTransformerBlock`s. They multiply what an attention or feed-forward returns by a gate of their norm
and add it to the residual, so that a branch is gated where its module returns: 0 there is 0 in the residual.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from genprune.errors import GenpruneError
from genprune.families import OperatingPoint, StockExport, renumbered
from genprune.families.diffusers_family import DiffusersFamily
from genprune.families.mmdit import modulation_channels
from genprune.families.unet import basic_block_sites
from genprune.replacements import PassThrough, Tombstone
from genprune.sites import Replacement, Site, Sites, effective_keep


class EmbeddingsOnly(PassThrough):
    """DiT's first block, removed: its input, and beside it the embedding of timestep and class.

    Every block of a DiT has its own `norm1.emb`; the host reads the first one's to modulate its output.
    """

    @classmethod
    def of(cls, removed: nn.Module) -> EmbeddingsOnly:
        module = cls()
        module.bury(removed, keep=("norm1.emb",))
        embeddings = removed.norm1.emb
        shared = {id(tensor): tensor for tensor in [*embeddings.parameters(), *embeddings.buffers()]}
        # Another module around the same weights: the host's call of it stays, the removed block's own call of it
        # goes, and costs tell the two apart by the module.
        module.norm1.emb = copy.deepcopy(embeddings, shared)
        return module


class TransformerFamily(DiffusersFamily):
    """What DiT and PixArt share: one list of blocks, which `num_layers` counts."""

    def stock_config(
        self, model: nn.Module, sites: Sites, keep: Mapping[str, Tensor], ops: Sequence[Mapping[str, Any]] = ()
    ) -> StockExport | None:
        keep = effective_keep(sites, keep)
        if ops:
            return None
        if any(sites[name].kind != "block" for name in keep):
            return None  # a stock configuration has one width for all blocks
        gone = [f"transformer_blocks.{index}:block" in keep for index in range(len(model.transformer_blocks))]
        config = self.config(model) | {"num_layers": gone.count(False)}
        return StockExport(config, renumbered("transformer_blocks", gone))


class DiTFamily(TransformerFamily):
    """Sites of DiT. Operating point: the model's `sample_size` (32: 256 px), and nothing but squares."""

    def sites(self, model: nn.Module) -> list[Site]:
        sites: list[Site] = []
        for index, block in enumerate(model.transformer_blocks):
            if isinstance(block, Tombstone):
                continue
            path = f"transformer_blocks.{index}"
            *inside, whole = basic_block_sites(path, block, None)
            if index == 0:
                whole = replace(whole, emptied=(Replacement(path, EmbeddingsOnly.of),))
            sites += [modulation_channels(f"{path}.norm1", block.norm1, whole.name), *inside, whole]
        return sites

    def stock_config(
        self, model: nn.Module, sites: Sites, keep: Mapping[str, Tensor], ops: Sequence[Mapping[str, Any]] = ()
    ) -> StockExport | None:
        if "transformer_blocks.0:block" in effective_keep(sites, keep):
            return None  # the next block's embeddings would modulate the host's output in place of the first one's
        return super().stock_config(model, sites, keep, ops)

    def operating_point(self, model: nn.Module, **given: int) -> OperatingPoint:
        size = model.config.sample_size
        point = OperatingPoint(**({"height": size, "width": size} | given))
        if point.height != point.width:
            raise GenpruneError(
                f"a {self.hosts[0]} makes squares only; expected one size, got height={point.height}, "
                f"width={point.width}. Pass the same number for both."
            )
        return point

    def example_inputs(
        self, model: nn.Module, point: OperatingPoint, device: torch.device | str, dtype: torch.dtype
    ) -> dict[str, Any]:
        shape = (point.batch, model.config.in_channels, point.height, point.width)
        return {
            "hidden_states": torch.randn(shape, device=device, dtype=dtype),
            "timestep": torch.full((point.batch,), 500, device=device),
            "class_labels": torch.zeros(point.batch, dtype=torch.long, device=device),
        }


class PixArtFamily(TransformerFamily):
    """Sites of PixArt-Alpha and PixArt-Sigma.

    There are no modulation channels: AdaLN-single computes shifts, scales and gates once for all blocks, in one linear
    that they share, and a block only adds its own `scale_shift_table`. A channel cut from that linear would have to go
    from every block, and the table is no layer whose rows can go.

    Operating point: the model's `sample_size` (128: 1024 px). The configuration does not say which pipeline calls the
    model: 300 text tokens as in `PixArtSigmaPipeline`, but 120 as in `PixArtAlphaPipeline` where the image's size is
    a condition, which only Alpha's 1024 px model has. Pass `text_length=120` for its smaller ones.
    """

    def sites(self, model: nn.Module) -> list[Site]:
        sites: list[Site] = []
        for index, block in enumerate(model.transformer_blocks):
            if not isinstance(block, Tombstone):
                sites += basic_block_sites(f"transformer_blocks.{index}", block, None)
        return sites

    def operating_point(self, model: nn.Module, **given: int) -> OperatingPoint:
        size, text = model.config.sample_size, 120 if model.use_additional_conditions else 300
        return OperatingPoint(**({"height": size, "width": size, "text_length": text} | given))

    def example_inputs(
        self, model: nn.Module, point: OperatingPoint, device: torch.device | str, dtype: torch.dtype
    ) -> dict[str, Any]:
        config, make = model.config, {"device": device, "dtype": dtype}
        inputs: dict[str, Any] = {
            "hidden_states": torch.randn(point.batch, config.in_channels, point.height, point.width, **make),
            "timestep": torch.full((point.batch,), 500, device=device),
        }
        if width := config.caption_channels or config.cross_attention_dim:
            inputs["encoder_hidden_states"] = torch.randn(point.batch, point.text_length, width, **make)
            # Both pipelines mask the padding of the prompt.
            inputs["encoder_attention_mask"] = torch.ones(point.batch, point.text_length, **make)
        if model.use_additional_conditions:
            size = torch.tensor([8.0 * point.height, 8.0 * point.width], **make)  # in image pixels
            inputs["added_cond_kwargs"] = {
                "resolution": size.repeat(point.batch, 1),  # (B, 2)
                "aspect_ratio": (size[:1] / size[1:]).repeat(point.batch, 1),  # (B, 1)
            }
        return inputs


FAMILIES = (
    DiTFamily("dit", ("DiTTransformer2DModel",), "diffusers", "hidden_states", neighbours=2),
    PixArtFamily("pixart", ("PixArtTransformer2DModel",), "diffusers", "hidden_states", neighbours=2),
)
