"""`UNet2DConditionModel` and `UNet2DModel`: SD 1.x/2.x, SDXL, DDPM-like denoisers and every fine-tune of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genprune.families import OperatingPoint, StockExport
from genprune.families.attention import attention_heads, feed_forward_neurons, residual_branch
from genprune.families.diffusers_family import DiffusersFamily
from genprune.families.unet_stock import unet_stock_config
from genprune.replacements import PassThrough, Tombstone
from genprune.sites import GatePoint, Replacement, Site, Sites, Slice


class ShortcutResnet(Tombstone):
    """A ResNet block without its branch: `(shortcut(x) + bias) / output_scale_factor`.

    `bias` is conv2's where only the inner channels went, and absent where the whole branch did.
    """

    @classmethod
    def without_branch(cls, removed: nn.Module) -> ShortcutResnet:
        return cls._of(removed, keep=("conv_shortcut",))

    @classmethod
    def without_channels(cls, removed: nn.Module) -> ShortcutResnet:
        module = cls._of(removed, keep=("conv_shortcut", "conv2.bias"))
        module.conv2.bias = removed.conv2.bias
        return module

    @classmethod
    def _of(cls, removed: nn.Module, keep: tuple[str, ...]) -> ShortcutResnet:
        module = cls()
        module.conv_shortcut = removed.conv_shortcut
        module.output_scale_factor = removed.output_scale_factor
        module.bury(removed, keep=keep)
        return module

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        hidden_states = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        if isinstance(self.conv2.bias, nn.Parameter):  # otherwise its tombstone
            hidden_states = hidden_states + self.conv2.bias[:, None, None]
        return hidden_states / self.output_scale_factor


class PassThroughWrapper(PassThrough):
    """A removed `Transformer2DModel`; the U-Net's blocks unpack its output as a tuple of one."""

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor]:
        return (hidden_states,)


class PassThroughAttention(PassThrough):
    """A removed attention that holds its own residual (`UNet2DModel`): its input, rescaled as the host does."""

    @classmethod
    def of(cls, removed: nn.Module) -> PassThroughAttention:
        module = super().of(removed)
        module.rescale_output_factor = removed.rescale_output_factor
        return module

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states / self.rescale_output_factor


def resnet_sites(path: str, resnet: nn.Module) -> list[Site]:
    """Inner channels of a ResNet block, in whole groups of its second norm, and its branch.

    Channels are gated after `norm2` (at conv2's input), where whole groups leave the statistics of the others alone.
    """
    groups = resnet.norm2.num_groups
    per_group = resnet.norm2.num_channels // groups
    branch = Site(
        path=path,
        kind="branch",
        size=1,
        gates=(GatePoint(f"{path}.conv2", side="output", width=0),),
        emptied=(Replacement(path, ShortcutResnet.without_branch),),
    )
    slices = [
        Slice(f"{path}.conv1", "out", width=per_group),
        Slice(f"{path}.norm2", "out", width=per_group),
        Slice(f"{path}.conv2", "in", width=per_group),
    ]
    if resnet.time_emb_proj is not None:
        slices.append(Slice(f"{path}.time_emb_proj", "out", width=per_group))
        if resnet.time_embedding_norm == "scale_shift":  # rows are [scale | shift]
            half = resnet.time_emb_proj.out_features // 2
            slices.append(Slice(f"{path}.time_emb_proj", "out", offset=half, width=per_group))
    channels = Site(
        path=path,
        kind="channels",
        size=groups,
        gates=(GatePoint(f"{path}.conv2", dim=1, width=per_group),),
        slices=tuple(slices),
        emptied=(Replacement(path, ShortcutResnet.without_channels),),
        parent=branch.name,
    )
    return [channels, branch]


def basic_block_sites(path: str, block: nn.Module, parent: str | None) -> list[Site]:
    """Heads, neurons, the three residual branches and the whole of one `BasicTransformerBlock`."""
    whole = Site(
        path=path,
        kind="block",
        size=1,
        gates=(GatePoint(path, side="output", width=0, blend=("hidden_states",)),),
        emptied=(Replacement(path, PassThrough.of),),
        parent=parent,
    )
    sites: list[Site] = []
    # Only plain layer norms leave with their branch: adaptive norms also modulate the feed-forward.
    plain_norm = block.norm_type == "layer_norm"
    for name, norm in (("attn1", "norm1"), ("attn2", "norm2"), ("ff", "norm3")):
        module = getattr(block, name)
        if module is None or isinstance(module, Tombstone):
            continue
        has_own_norm = plain_norm and getattr(block, norm) is not None
        branch = residual_branch(f"{path}.{name}", whole.name, norm=f"{path}.{norm}" if has_own_norm else None)
        if name == "ff":
            sites += [site for site in (feed_forward_neurons(f"{path}.ff", module, branch.name),) if site]
        else:
            sites.append(attention_heads(f"{path}.{name}", module, branch.name))
        sites.append(branch)
    return [*sites, whole]


def _is(module: nn.Module, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(module).__mro__)


class UNetFamily(DiffusersFamily):
    """Sites of a U-Net; operating point in latent pixels at the model's `sample_size`, 77 text tokens."""

    def sites(self, model: nn.Module) -> list[Site]:
        sites: list[Site] = []
        inside: str | None = None  # path of the wrapper being walked
        for path, module in model.named_modules():
            if _is(module, "Transformer2DModel") and module.is_input_continuous:
                inside = path
                sites += self._wrapper_sites(path, module)
            elif _is(module, "ResnetBlock2D") and not (module.up or module.down):
                sites += resnet_sites(path, module)
            elif _is(module, "Attention") and module.residual_connection and not (inside and path.startswith(inside)):
                sites += self._bare_attention_sites(path, module)
        return sites

    def _wrapper_sites(self, path: str, wrapper: nn.Module) -> list[Site]:
        whole = Site(
            path=path,
            kind="wrapper",
            size=1,
            gates=(GatePoint(f"{path}.proj_out", side="output", width=0),),
            emptied=(Replacement(path, PassThroughWrapper.of),),
        )
        sites = []
        for index, block in enumerate(wrapper.transformer_blocks):
            if _is(block, "BasicTransformerBlock"):  # not one that an earlier cut removed
                sites += basic_block_sites(f"{path}.transformer_blocks.{index}", block, whole.name)
        return [*sites, whole]

    def _bare_attention_sites(self, path: str, attention: nn.Module) -> list[Site]:
        whole = Site(
            path=path,
            kind="wrapper",
            size=1,
            # The residual lies inside the module: its output is not the branch.
            gates=(GatePoint(f"{path}.to_out.0", side="output", width=0),),
            emptied=(Replacement(path, PassThroughAttention.of),),
        )
        return [attention_heads(path, attention, whole.name), whole]

    def operating_point(self, model: nn.Module, **given: int) -> OperatingPoint:
        size = model.config.sample_size or 64
        height, width = (size, size) if isinstance(size, int) else size
        text = 77 if self.name == "unet-conditional" else 0
        return OperatingPoint(**({"height": height, "width": width, "text_length": text} | given))

    def example_inputs(
        self, model: nn.Module, point: OperatingPoint, device: torch.device | str, dtype: torch.dtype
    ) -> dict[str, Any]:
        config = model.config
        make = {"device": device, "dtype": dtype}
        inputs: dict[str, Any] = {
            "sample": torch.randn(point.batch, config.in_channels, point.height, point.width, **make),
            "timestep": torch.full((point.batch,), 500, device=device),
        }
        if self.name == "unet":
            if config.num_class_embeds is not None:
                inputs["class_labels"] = torch.zeros(point.batch, dtype=torch.long, device=device)
            return inputs
        if config.class_embed_type in ("projection", "simple_projection"):
            inputs["class_labels"] = torch.randn(point.batch, config.projection_class_embeddings_input_dim, **make)
        elif config.class_embed_type is not None or config.num_class_embeds is not None:
            inputs["class_labels"] = torch.zeros(point.batch, dtype=torch.long, device=device)
        width = config.cross_attention_dim
        width = width if isinstance(width, int) else width[0]
        text = torch.randn(point.batch, point.text_length, width, **make)
        # AudioLDM: the text is the class embedding, and its blocks attend to themselves twice
        inputs["encoder_hidden_states"] = None if config.class_embeddings_concat else text
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            inputs["added_cond_kwargs"] = {
                "text_embeds": torch.randn(point.batch, pooled, **make),
                "time_ids": torch.zeros(point.batch, 6, **make),
            }
        if config.time_cond_proj_dim is not None:
            inputs["timestep_cond"] = torch.randn(point.batch, config.time_cond_proj_dim, **make)
        return inputs

    def stock_config(
        self, model: nn.Module, sites: Sites, keep: Mapping[str, Tensor], ops: Sequence[Mapping[str, Any]] = ()
    ) -> StockExport | None:
        return unet_stock_config(self.config(model), model, sites, keep, ops)


FAMILIES = (
    UNetFamily("unet-conditional", ("UNet2DConditionModel",), "diffusers"),
    UNetFamily("unet", ("UNet2DModel",), "diffusers"),
)
