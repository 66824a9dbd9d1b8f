"""timm's plain transformers: `VisionTransformer` and its relatives, `Eva` (EVA-02, DINOv3, rotary embeddings)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from genprune.errors import UnsupportedModel
from genprune.tokens.hooks import LayerHooks
from genprune.tokens.methods import TokenMethod
from genprune.tokens.state import Shadow, TokenState


class RestoredIntermediates(Shadow):
    """`forward_intermediates` reshapes to the grid of patches, so that layers hand on full grids during it."""

    name = "forward_intermediates"

    def __call__(self, *args, **kwargs):
        self.state.dense = True
        try:
            return self.host(*args, **kwargs)
        finally:
            self.state.dense = False


class WeightedPool(Shadow):
    """The mean over merged patches, each counted as often as patches were merged into it."""

    name = "forward_head"

    def __call__(self, x: Tensor, *args, **kwargs):
        now = self.state.at[self.state.depth]
        if now is not None and now.size is not None and now.size.shape[1] < x.shape[1]:
            share = now.size * (now.size.shape[1] / now.size.sum(1, keepdim=True))  # (B, n), mean 1
            prefix = x.shape[1] - now.size.shape[1]
            x = torch.cat([x[:, :prefix], x[:, prefix:] * share.to(x.dtype).unsqueeze(-1)], 1)
        return self.host(x, *args, **kwargs)


def rotate_cat(query: Tensor, rope: Tensor, prefix: int, half: bool) -> Tensor:
    """timm's rotary embedding of the patches of `(B, H, N, d)`."""
    from timm.layers import apply_rot_embed_cat

    patches = apply_rot_embed_cat(query[:, :, prefix:], rope, half=half)
    return torch.cat([query[:, :, :prefix], patches.to(query.dtype)], 2)


@dataclass
class TimmViT:
    """A timm model with `blocks` in a row over one sequence of tokens, whose attentions have `q_norm` and `k_norm`."""

    model: nn.Module
    bias_argument: str | None = "attn_mask"
    paths: tuple[str, ...] = field(init=False)
    scored: tuple[int, ...] = field(init=False)
    prefix: int = field(init=False)
    patches: int = field(init=False)

    def __post_init__(self) -> None:
        blocks = self.model.blocks
        self.paths = tuple(f"blocks.{index}" for index in range(len(blocks)))
        self.prefix = self.model.num_prefix_tokens
        self.patches = self.model.patch_embed.num_patches
        self.scored = tuple(index for index, block in enumerate(blocks) if self._readable(block))
        if not self.scored:
            raise UnsupportedModel(
                f"no block of this {type(self.model).__name__} has an attention with q_norm and k_norm (its first is "
                f"{type(blocks[0]).__name__}); expected one to read queries and keys from. Tokens cannot be reduced."
            )

    @staticmethod
    def _readable(block: nn.Module) -> bool:
        attention = getattr(block, "attn", None)
        return all(hasattr(attention, name) for name in ("q_norm", "k_norm", "scale"))

    @property
    def class_token(self) -> bool:
        return getattr(self.model, "cls_token", None) is not None

    def check(self, method: TokenMethod) -> None:
        if method.placement == "before_mlp" and not all(hasattr(b, "drop_path2") for b in self.model.blocks):
            raise UnsupportedModel(
                f"the blocks of this {type(self.model).__name__} do not run attention and MLP one after the other; "
                "expected that for placement='before_mlp'. Use placement='after_block'."
            )
        if method.reduce != "drop" and getattr(self.model, "global_pool", "") == "avgmax":
            raise UnsupportedModel(
                "this model pools by maximum and mean; expected a mean or a class token, where merged tokens can be "
                "weighed. Use reduce='drop'."
            )

    def attach(self, state: TokenState) -> list:
        attached = [RestoredIntermediates(self.model, state).attach()]
        if getattr(self.model, "global_pool", "") == "avg":
            attached.append(WeightedPool(self.model, state).attach())
        for layer, block in enumerate(self.model.blocks):
            attached += self.attach_block(state, layer, block)
        return attached

    def attach_block(self, state: TokenState, layer: int, block: nn.Module) -> list:
        attention = block.attn
        half = getattr(attention, "rotate_half", False)
        hooks = LayerHooks(
            state,
            layer,
            self.prefix,
            self.class_token,
            attention,
            self.bias_argument,
            partial(rotate_cat, prefix=self.prefix, half=half),
        )
        handles = [
            block.register_forward_pre_hook(hooks.enter, with_kwargs=True),
            block.register_forward_hook(hooks.leave),
        ]
        if layer in self.scored:
            handles.append(attention.q_norm.register_forward_hook(hooks.take_query))
            handles.append(attention.k_norm.register_forward_hook(hooks.take_key))
        if hasattr(block, "drop_path2"):
            # A norm after the MLP (res-post-norm) belongs to the branch; one before it reads the stream.
            post_norm = "Post" in type(block).__name__
            first = block.mlp if post_norm else block.norm2
            handles.append(first.register_forward_pre_hook(hooks.enter_mlp))
            handles.append(block.drop_path2.register_forward_hook(hooks.leave_mlp))
        return handles

    def example_inputs(self, model: nn.Module) -> dict[str, Tensor]:
        weight = next(model.parameters())
        height, width = self.model.patch_embed.img_size or self.model.pretrained_cfg["input_size"][1:]
        channels = self.model.patch_embed.proj.in_channels
        return {"x": torch.zeros(1, channels, height, width, device=weight.device, dtype=weight.dtype)}


def host_of(model: nn.Module) -> TimmViT | None:
    try:
        from timm.models.eva import Eva
        from timm.models.vision_transformer import VisionTransformer
    except ModuleNotFoundError:
        return None
    return TimmViT(model) if isinstance(model, (VisionTransformer, Eva)) else None
