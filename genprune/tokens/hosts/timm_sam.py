"""timm's `VisionTransformerSAM`: a grid of patches, attention in windows, a convolution at the end.

The grid has to stay whole: windows are cut out of it, and the neck convolves it. So attention always sees all patches,
and patches that are "removed" only skip the MLPs from there on, which are about two thirds of the work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genprune.errors import UnsupportedModel
from genprune.tokens.choice import LayerView
from genprune.tokens.hooks import along, gathered_bias
from genprune.tokens.hosts.timm_vit import TimmViT
from genprune.tokens.methods import TokenMethod
from genprune.tokens.reducing import gather_tokens, restore_tokens
from genprune.tokens.state import Tokens, TokenState


class SkippedMLPHooks:
    """The hooks of one block; patches are those whose MLP runs.

    Args:
        state: shared by all blocks of the model.
        layer: index of this block.
        attention: of the block, where its attention is global; None: it has windows, and is not scored.
    """

    def __init__(self, state: TokenState, layer: int, attention: nn.Module | None):
        self.state, self.layer, self.attention = state, layer, attention
        self.size = (0, 0)  # of the grid

    def enter(self, block: nn.Module, inputs: tuple) -> None:
        self.size = tuple(inputs[0].shape[1:3])
        if self.layer == 0:
            self.state.at[0] = Tokens(math.prod(self.size))

    def take_query(self, norm: nn.Module, inputs: tuple, query: Tensor) -> None:
        if self.state.schedule[self.layer] is not None:
            self.state.query[self.layer] = query.detach()  # (B * H, N, d)

    def take_key(self, norm: nn.Module, inputs: tuple, key: Tensor) -> None:
        if self.state.schedule[self.layer] is not None:
            self.state.key[self.layer] = key.detach()

    def enter_mlp(self, norm: nn.Module, inputs: tuple) -> tuple | None:
        """The MLP's norm is given `(B, N, C)`: only patches that are left go on."""
        state, layer = self.state, self.layer
        if state.at[layer] is None:
            return None
        if state.method.placement == "before_mlp":
            self._reduce(inputs[0])
        now = self._now()
        return None if now.origin is None else (gather_tokens(inputs[0], now.origin, 0), *inputs[1:])

    def leave_mlp(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        """What the MLP adds to the grid: nothing where it was skipped, or the same as for the most similar patch."""
        now = self._now()
        if now is None or now.origin is None:
            return None
        how = "nearest" if self.state.method.restore == "nearest" else "zeros"
        return restore_tokens(output, now.origin, now.count, 0, how, now.stands)

    def leave(self, block: nn.Module, inputs: tuple, output: Tensor) -> None:
        if self.state.at[self.layer] is not None and self.state.method.placement != "before_mlp":
            self._reduce(output)
        self.state.query[self.layer] = self.state.key[self.layer] = None

    # ---- parts ----------------------------------------------------------------------------------------------------

    def _now(self) -> Tokens | None:
        """The patches whose MLP runs in this block."""
        return self.state.at[self.layer + (self.state.method.placement == "before_mlp")]

    @torch.no_grad()
    def _reduce(self, hidden: Tensor) -> None:
        state, layer = self.state, self.layer
        now = state.at[layer]
        count = now.count if now.origin is None else now.origin.shape[1]
        keep = state.keep(layer, count)
        state.at[layer + 1] = now
        if keep >= count:
            return
        query, key, bias = self._graph(len(hidden), now)
        view = LayerView(
            prefix=0,
            class_token=False,
            scale=self.attention.scale,
            layer=layer,
            depth=state.depth,
            bias=bias,
            wants_target=state.method.restore == "nearest",
        )
        choice = state.method.choose(query, key, keep, view)
        origin = choice.kept if now.origin is None else now.origin.gather(1, choice.kept)
        stands = now.stands
        if choice.target is not None:
            stands = choice.target if now.origin is None else choice.target.gather(1, now.stands)
        state.at[layer + 1] = Tokens(now.count, origin, stands)

    def _graph(self, batch: int, now: Tokens) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries and keys of the patches that are left, `(B, H, n, d)`, and the bias between them."""
        from timm.layers import apply_rot_embed_cat
        from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias

        attention, bias = self.attention, None
        query, key = self.state.query[self.layer], self.state.key[self.layer]  # (B * H, N, d)
        if attention.use_rel_pos:
            tables = attention.rel_pos_h, attention.rel_pos_w
            bias = get_decomposed_rel_pos_bias(query, *tables, self.size, self.size)  # (B * H, N, N)
            bias = bias.unflatten(0, (batch, -1))
        elif attention.rope is not None:
            rope = attention.rope.get_embed()
            query, key = apply_rot_embed_cat(query, rope), apply_rot_embed_cat(key, rope)
        query, key = query.unflatten(0, (batch, -1)), key.unflatten(0, (batch, -1))
        if now.origin is not None:
            query, key = along(query, now.origin, 2), along(key, now.origin, 2)
            bias = None if bias is None else gathered_bias(bias, now.origin, 0, now.count)
        return query, key, bias


@dataclass
class TimmSAM(TimmViT):
    """Scored in blocks of global attention; merging has no meaning where nothing leaves the sequence."""

    merges = False

    def readable(self, block: nn.Module) -> bool:
        return block.window_size == 0 and super().readable(block)

    def check(self, method: TokenMethod) -> None:
        if method.reduce not in ("auto", "drop"):
            raise UnsupportedModel(
                f"reduce={method.reduce!r} on a {type(self.model).__name__}, whose grid stays whole: patches skip "
                "MLPs only; expected reduce='drop'. With restore='nearest' a patch gets what the MLP gave to the one "
                "that is most similar."
            )

    def attach(self, state: TokenState) -> list:
        handles = []
        for layer, block in enumerate(self.model.blocks):
            hooks = SkippedMLPHooks(state, layer, block.attn if layer in self.scored else None)
            handles += [
                block.register_forward_pre_hook(hooks.enter),
                block.register_forward_hook(hooks.leave),
                block.norm2.register_forward_pre_hook(hooks.enter_mlp),
                block.drop_path2.register_forward_hook(hooks.leave_mlp),
            ]
            if layer in self.scored:
                handles += self.attach_reading(hooks, block)
        return handles


def host_of(model: nn.Module) -> TimmSAM | None:
    try:
        from timm.models.vision_transformer_sam import VisionTransformerSAM
    except ModuleNotFoundError:
        return None
    return TimmSAM(model) if isinstance(model, VisionTransformerSAM) else None
