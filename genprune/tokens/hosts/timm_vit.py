"""timm's plain transformers: `VisionTransformer` and its relatives, `Eva` (EVA-02, DINOv3, rotary embeddings)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from genprune.errors import UnsupportedModel
from genprune.tokens.hooks import CallStart, LayerHooks
from genprune.tokens.methods import TokenMethod
from genprune.tokens.state import Shadow, Tokens, TokenState


class RestoredIntermediates(Shadow):
    """`forward_intermediates` reshapes to the grid of patches, so that layers hand on full grids during it."""

    name = "forward_intermediates"

    def __call__(self, *args, **kwargs):
        usual, self.state.dense = self.state.dense, True
        try:
            return self.host(*args, **kwargs)
        finally:
            self.state.dense = usual


class WeightedPool(Shadow):
    """The mean over merged patches, each counted as often as patches were merged into it."""

    name = "forward_head"

    def __call__(self, *args, **kwargs):
        # NaFlexVit names its first argument, and names it otherwise.
        x, *args = args or [kwargs.pop("patches" if "patches" in kwargs else "x")]
        now = self.state.at[self.state.depth]
        prefix = getattr(self.module, "num_prefix_tokens", 0)
        if now is not None and now.size is not None and x.shape[:2] == (len(now.size), prefix + now.size.shape[1]):
            x = self._weighted(x, now, prefix)
        return self.host(x, *args, **kwargs)

    def _weighted(self, x: Tensor, now: Tokens, prefix: int) -> Tensor:
        """Tokens scaled so that the host's plain mean over them is the weighted one."""
        size, counted = now.size, torch.ones_like(now.size) if now.valid is None else now.valid.to(now.size.dtype)
        if getattr(self.module, "pool_include_prefix", False):
            ones = size.new_ones(len(size), prefix)
            size, counted = torch.cat([ones, size], 1), torch.cat([ones, counted], 1)
        share = size * (counted.sum(1, keepdim=True) / size.sum(1, keepdim=True))  # mean 1 over what is counted
        first = x.shape[1] - size.shape[1]
        return torch.cat([x[:, :first], x[:, first:] * share.to(x.dtype).unsqueeze(-1)], 1)


class WeightedAttentionPool:
    """The hook of an attention that pools: merged patches attract as much of it as all that were merged."""

    def __init__(self, state: TokenState):
        self.state = state

    def hook(self, module: nn.Module, inputs: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        now = self.state.at[self.state.depth]
        x = inputs[0]
        if now is None or now.size is None or not self.state.method.proportional or len(x) != len(now.size):
            return None
        sizes = now.size.clamp(min=1e-4).log().to(x.dtype)
        sizes = nn.functional.pad(sizes, (x.shape[1] - sizes.shape[1], 0))[:, None, None]  # (B, 1, 1, N)
        given = kwargs.get("attn_mask")
        return inputs, {**kwargs, "attn_mask": sizes if given is None else given + sizes}


def rotate_cat(query: Tensor, rope: Tensor, prefix: int, half: bool) -> Tensor:
    """timm's rotary embedding of the patches of `(B, H, N, d)`."""
    from timm.layers import apply_rot_embed_cat

    patches = apply_rot_embed_cat(query[:, :, prefix:], rope, half=half)
    return torch.cat([query[:, :, :prefix], patches.to(query.dtype)], 2)


@dataclass
class TimmViT:
    """A timm model with `blocks` in a row over one sequence of tokens.

    Queries and keys are read where they leave `q_norm` and `k_norm` of the attention of a block, of all its
    attentions (`ParallelThingsBlock`), or of the block itself (`ParallelScalingBlock`).
    """

    model: nn.Module
    paths: tuple[str, ...] = field(init=False)
    scored: tuple[int, ...] = field(init=False)
    prefix: int = field(init=False)
    patches: int = field(init=False)

    bias_argument: ClassVar[str | None] = "attn_mask"

    def __post_init__(self) -> None:
        self.paths = tuple(f"{self.trunk_path}blocks.{index}" for index in range(len(self.trunk.blocks)))
        self.prefix = getattr(self.trunk, "num_prefix_tokens", 0)
        self.patches = self.count_patches()
        self.scored = tuple(index for index, block in enumerate(self.trunk.blocks) if self.readable(block))
        if not self.scored:
            raise UnsupportedModel(
                f"no block of this {type(self.model).__name__} has an attention whose queries and keys can be read "
                f"(its first is {type(self.trunk.blocks[0]).__name__}); expected one with q_norm and k_norm. Tokens "
                "cannot be reduced in it."
            )

    # ---- what differs between hosts ------------------------------------------------------------------------------

    trunk_path: ClassVar[str] = ""  # where the module with the blocks is: `encoder.`

    @property
    def trunk(self) -> nn.Module:
        """The module that has the blocks."""
        return self.model.get_submodule(self.trunk_path.removesuffix("."))

    @property
    def embedding(self) -> nn.Module:
        """What makes tokens of an image; runs once, first, in every call."""
        return self.trunk.patch_embed

    def count_patches(self) -> int:
        return self.embedding.num_patches

    def image_size(self) -> tuple[int, int]:
        return self.embedding.img_size or self.model.pretrained_cfg["input_size"][1:]

    @property
    def class_token(self) -> bool:
        return getattr(self.trunk, "cls_token", None) is not None

    @property
    def needs_grid(self) -> bool:
        """Whether what comes after the blocks expects all patches: a model without pooling gives tokens back."""
        return not getattr(self.model, "global_pool", "")

    def attentions(self, block: nn.Module) -> list[nn.Module]:
        """What has the `q_norm`, `k_norm` and `scale` of a block; several of one scale are read side by side."""
        if hasattr(block, "attns"):
            return [branch.attn for branch in block.attns]
        return [block if hasattr(block, "q_norm") else getattr(block, "attn", None)]

    def readable(self, block: nn.Module) -> bool:
        return all(hasattr(a, name) for a in self.attentions(block) for name in ("q_norm", "k_norm", "scale"))

    def sequential(self, block: nn.Module) -> bool:
        """Whether the block runs one attention and then one MLP."""
        return hasattr(block, "norm2") and hasattr(block, "drop_path2")

    def after_norm(self, block: nn.Module) -> bool:
        """Whether the norm of the MLP comes after it, as part of the branch."""
        from timm.models.eva import EvaBlockPostNorm
        from timm.models.vision_transformer import ResPostBlock
        from timm.models.vision_transformer_relpos import ResPostRelPosBlock

        return isinstance(block, (EvaBlockPostNorm, ResPostBlock, ResPostRelPosBlock))

    # ---- what does not -------------------------------------------------------------------------------------------

    @property
    def before_mlp(self) -> bool:
        """Whether tokens can be reduced between attention and MLP of a block."""
        return all(self.sequential(block) for block in self.trunk.blocks)

    @property
    def merges(self) -> bool:
        """Whether merged tokens can be weighed where they are pooled."""
        pool = getattr(self.model, "global_pool", "")
        return pool != "avgmax" and (pool != "prr" or self.class_token)

    def check(self, method: TokenMethod) -> None:
        if method.placement == "before_mlp" and not self.before_mlp:
            raise UnsupportedModel(
                f"the blocks of this {type(self.model).__name__} do not run one attention and one MLP after the "
                "other; expected that for placement='before_mlp'. Use placement='after_block'."
            )
        if method.reduce not in ("auto", "drop") and not self.merges:
            raise UnsupportedModel(
                f"this model pools by '{self.model.global_pool}'; expected a mean, an attention or a class token, "
                "where merged tokens can be weighed. Use reduce='drop'."
            )

    def attach(self, state: TokenState) -> list:
        state.dense = self.needs_grid
        attached = [self.embedding.register_forward_pre_hook(CallStart(state).hook)]
        for module in {id(m): m for m in (self.model, self.trunk)}.values():
            if hasattr(module, RestoredIntermediates.name):
                attached.append(RestoredIntermediates(module, state).attach())
        if getattr(self.model, "global_pool", "") == "avg" and not self.needs_grid:
            attached.append(WeightedPool(self.model, state).attach())
        pool = getattr(self.model, "attn_pool", None)
        if pool is not None and self.model.global_pool == "map":
            attached.append(pool.register_forward_pre_hook(WeightedAttentionPool(state).hook, with_kwargs=True))
        for layer, block in enumerate(self.trunk.blocks):
            attached += self.attach_block(self.hooks(state, layer, block), block)
        return attached

    def hooks(self, state: TokenState, layer: int, block: nn.Module) -> LayerHooks:
        attention = self.attentions(block)[0] if layer in self.scored else None
        return LayerHooks(
            state,
            layer,
            self.prefix,
            self.class_token,
            attention,
            self.bias_argument,
            partial(rotate_cat, prefix=self.prefix, half=getattr(attention, "rotate_half", False)),
            heads_dim=2 if self._heads_third(attention) else 1,
        )

    @staticmethod
    def _heads_third(attention: nn.Module | None) -> bool:
        """Whether its q_norm gets `(B, N, H, d)`."""
        from timm.models.vision_transformer import ParallelScalingBlock

        return isinstance(attention, ParallelScalingBlock)

    def attach_block(self, hooks: LayerHooks, block: nn.Module) -> list:
        handles = [
            block.register_forward_pre_hook(hooks.enter, with_kwargs=True),
            block.register_forward_hook(hooks.leave),
        ]
        if hooks.layer in self.scored:
            handles += self.attach_reading(hooks, block)
        if self.sequential(block):
            first = block.mlp if self.after_norm(block) else block.norm2
            handles.append(first.register_forward_pre_hook(hooks.enter_mlp))
            handles.append(block.drop_path2.register_forward_hook(hooks.leave_mlp))
        return handles

    def attach_reading(self, hooks: LayerHooks, block: nn.Module) -> list:
        handles = []
        for attention in self.attentions(block):
            handles.append(attention.q_norm.register_forward_hook(hooks.take_query))
            handles.append(attention.k_norm.register_forward_hook(hooks.take_key))
        return handles

    def example_inputs(self, model: nn.Module) -> dict[str, Tensor]:
        weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
        channels = getattr(self.model, "in_chans", 3)
        return {"x": torch.zeros(1, channels, *self.image_size(), device=weight.device, dtype=weight.dtype)}


def host_of(model: nn.Module) -> TimmViT | None:
    try:
        from timm.models.eva import Eva
        from timm.models.vision_transformer import VisionTransformer
    except ModuleNotFoundError:
        return None
    return TimmViT(model) if isinstance(model, (VisionTransformer, Eva)) else None
