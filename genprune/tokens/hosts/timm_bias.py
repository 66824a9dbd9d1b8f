"""timm's transformers with relative position biases: `Beit` and `VisionTransformerRelPos`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from genprune.tokens.hooks import LayerHooks, gathered_bias
from genprune.tokens.hosts.timm_vit import TimmViT
from genprune.tokens.state import Shadow


class BlockBias(Shadow):
    """The bias table of one block: for the tokens that are left, and noted for the votes.

    Args:
        module: what has the method.
        hooks: of the block.
        name: of the method that gives the bias, `(1, H, N, N)`.
        sizes: whether log sizes of merged tokens are added here, because the block has no argument for them.
    """

    def __init__(self, module: nn.Module, hooks: LayerHooks, name: str, sizes: bool):
        super().__init__(module, hooks.state)
        self.hooks, self.name, self.sizes = hooks, name, sizes

    def __call__(self) -> Tensor:
        bias = self.host()
        state, layer = self.state, self.hooks.layer
        now = state.at[layer]
        if now is None:
            return bias
        if now.origin is not None:
            bias = gathered_bias(bias, now.origin, self.hooks.prefix, self.hooks.prefix + now.count)
        if self.sizes and (sizes := self.hooks.log_sizes(now, bias.dtype)) is not None:
            bias = bias + sizes
        if state.schedule[layer] is not None:
            shared = state.bias[layer]
            state.bias[layer] = bias.detach() if shared is None or self.sizes else bias.detach() + shared
        return bias


class BeitHooks(LayerHooks):
    """BEiT's attention has no modules at its queries and keys: they are computed once more where they are needed."""

    @torch.no_grad()
    def take_input(self, attention: nn.Module, inputs: tuple) -> None:
        if self.state.schedule[self.layer] is None:
            return
        hidden = inputs[0]
        batch, tokens, _ = hidden.shape
        rows = attention.qkv.weight.shape[0] // 3 * 2  # queries and keys
        bias = None if attention.q_bias is None else torch.cat((attention.q_bias, attention.k_bias))
        both = nn.functional.linear(hidden, attention.qkv.weight[:rows], bias)
        both = both.reshape(batch, tokens, 2, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        self.state.query[self.layer], self.state.key[self.layer] = both.unbind(0)  # (B, H, N, d)


@dataclass
class TimmBeit(TimmViT):
    """`Beit`: biases of each block, shared ones as an argument, or none."""

    bias_argument: ClassVar[str | None] = "shared_rel_pos_bias"

    def readable(self, block: nn.Module) -> bool:
        from timm.models.beit import Attention

        return isinstance(block.attn, Attention)

    def hooks(self, state, layer: int, block: nn.Module) -> LayerHooks:
        attention = block.attn if layer in self.scored else None
        return BeitHooks(state, layer, self.prefix, self.class_token, attention, self.bias_argument)

    def attach_reading(self, hooks: LayerHooks, block: nn.Module) -> list:
        handles = [block.attn.register_forward_pre_hook(hooks.take_input)]
        if block.attn.relative_position_bias_table is not None:
            handles.append(BlockBias(block.attn, hooks, "_get_rel_pos_bias", sizes=False).attach())
        return handles


@dataclass
class TimmRelPos(TimmViT):
    """`VisionTransformerRelPos`: a block with biases of its own takes no others."""

    bias_argument: ClassVar[str | None] = "shared_rel_pos"

    def attach_reading(self, hooks: LayerHooks, block: nn.Module) -> list:
        handles = super().attach_reading(hooks, block)
        if block.attn.rel_pos is not None:
            hooks.bias_argument = None
            handles.append(BlockBias(block.attn.rel_pos, hooks, "get_bias", sizes=True).attach())
        return handles


def host_of(model: nn.Module) -> TimmViT | None:
    try:
        from timm.models.beit import Beit
        from timm.models.vision_transformer_relpos import VisionTransformerRelPos
    except ModuleNotFoundError:
        return None
    if isinstance(model, Beit):
        return TimmBeit(model)
    return TimmRelPos(model) if isinstance(model, VisionTransformerRelPos) else None
