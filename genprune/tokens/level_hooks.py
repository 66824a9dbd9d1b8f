"""Hooks of a U-Net's transformer blocks: fewer image tokens inside each, the full grid between them.

The blocks of one resolution (a level) share a choice. It comes from the first of them, which runs in full where it
scores, and is needed before the attention that it saves in the others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genprune.errors import UnsupportedModel
from genprune.tokens.choice import LayerView
from genprune.tokens.denoising_steps import Steps, fewer
from genprune.tokens.hooks import along
from genprune.tokens.spans import Span, returned, shortened
from genprune.tokens.state import TokenState
from genprune.tokens.stream_hooks import argument, with_argument

MASK_PLACE = {"block": 1, "attention": 2}  # of the self-attention's mask among the arguments


class LevelHooks:
    """The hooks of one block.

    Args:
        state: shared by all blocks of the model; its layers are the levels.
        steps: shared by all blocks of the model.
        level: of this block.
        scores: this block chooses for its level.
        layer, depth: number of this block, and of all, for methods that care.
    """

    def __init__(self, state: TokenState, steps: Steps, level: int, scores: bool, layer: int, depth: int):
        self.state, self.steps, self.level, self.scores = state, steps, level, scores
        self.layer, self.depth = layer, depth
        self._forget()

    def _forget(self) -> None:
        self.span = self.query = self.key = self.keep = None

    def __getstate__(self) -> dict:
        """Without the tensors of the last call."""
        return {name: value for name, value in self.__dict__.items() if name not in ("span", "query", "key", "keep")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget()

    def attach(self, block: nn.Module) -> list:
        attention = block.attn1
        handles = [
            block.register_forward_pre_hook(self.enter_block, with_kwargs=True),
            block.register_forward_hook(self.leave_block),
            attention.register_forward_pre_hook(self.enter_attention, with_kwargs=True),
            attention.register_forward_hook(self.leave_attention),
        ]
        if self.scores:
            for norm, projection, hook in (("norm_q", "to_q", self.take_query), ("norm_k", "to_k", self.take_key)):
                source = getattr(attention, norm, None)
                source = getattr(attention, projection) if source is None else source
                handles.append(source.register_forward_hook(hook))
        return handles

    def enter_block(self, block: nn.Module, inputs: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        return self._enter("block", inputs, kwargs)

    def enter_attention(self, attention: nn.Module, inputs: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        return self._enter("attention", inputs, kwargs)

    def take_query(self, norm: nn.Module, inputs: tuple, query: Tensor) -> None:
        if self.keep is not None:
            self.query = query.detach()

    def take_key(self, norm: nn.Module, inputs: tuple, key: Tensor) -> None:
        if self.keep is not None:
            self.key = key.detach()

    def leave_attention(self, attention: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        if self.keep is not None:  # this block runs in full, and is scored
            self._choose(attention, output)
        if self.steps.settings.around != "attention" or self.span is None:
            return None
        # What the attention adds to a token: that of the most similar one that stayed, or nothing.
        before, choice = torch.zeros_like(self.span.before), self.span.choice
        span = Span(before, torch.zeros_like(self.span.short), choice)
        self._forget()
        return returned(span, output, self.steps.settings.restore)

    def leave_block(self, block: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        span, around = self.span, self.steps.settings.around
        self._forget()
        if around != "block" or span is None:
            return None
        return returned(span, output, self.steps.settings.restore)

    # ---- parts ---------------------------------------------------------------------------------------------------

    def _enter(self, around: str, inputs: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self.steps.settings.around != around:
            return None
        self._forget()
        planned = self.state.schedule[self.level]
        if planned is None:
            return None
        hidden = argument(inputs, kwargs, 0, "hidden_states")  # (B, n, C)
        rows, count = hidden.shape[:2]
        keep = fewer(count, max(1, planned[0] * count // planned[1]), self.steps.factor)
        if keep >= count:
            return None
        if self.scores:
            choice = self.steps.remembered(self.level, rows, count, keep)
            if choice is None:
                self.keep = keep
                return None
            self.steps.at[self.level] = choice
            if self.steps.in_full:
                return None
        choice = self.steps.at.get(self.level)
        if choice is None:
            return None
        self.span = shortened(hidden, choice, self.state.method.reduce)
        inputs, kwargs = with_argument(inputs, kwargs, 0, "hidden_states", self.span.short)
        mask = argument(inputs, kwargs, MASK_PLACE[around], "attention_mask")
        if mask is not None:  # (B or 1, 1, n)
            mask = along(mask, choice.kept, -1)
            inputs, kwargs = with_argument(inputs, kwargs, MASK_PLACE[around], "attention_mask", mask)
        return inputs, kwargs

    @torch.no_grad()
    def _choose(self, attention: nn.Module, output: Tensor) -> None:
        if self.query is None or self.key is None:
            raise UnsupportedModel(
                f"an attention at level {self.level} ran without calling to_q and to_k (fused projections?); "
                "expected separate ones, to read queries and keys from. Call unfuse_qkv_projections() on the model."
            )
        query, key = (
            x.unflatten(-1, (attention.heads, -1)).transpose(1, 2) if x.ndim == 3 else x
            for x in (self.query, self.key)
        )  # (B, H, n, d)
        view = LayerView(
            prefix=0,
            class_token=False,
            scale=query.shape[-1] ** -0.5,
            layer=self.layer,
            depth=self.depth,
            wants_target=self.steps.settings.restore in ("update", "nearest"),
        )
        choice = self.steps.choose(self.level, self.state.method, query, key, self.keep, view)
        self.steps.at[self.level] = choice
        self.query = self.key = self.keep = None


class UNetEnds:
    """The hooks around a U-Net: a call begins and ends."""

    def __init__(self, state: TokenState, steps: Steps):
        self.state, self.steps = state, steps

    def attach(self, model: nn.Module) -> list:
        return [
            model.register_forward_pre_hook(self.begin, with_kwargs=True),
            model.register_forward_hook(self.end),
        ]

    def begin(self, model: nn.Module, inputs: tuple, kwargs: dict) -> None:
        given = kwargs.get("cross_attention_kwargs") or {}
        if "ip_adapter_masks" in given and self.steps.settings.around == "block":
            raise UnsupportedModel(
                f"the call passes ip_adapter_masks, which the attention of this {type(model).__name__} reads as a "
                "full grid; expected none where whole blocks run on fewer tokens. Use "
                "handle.set(around='attention')."
            )
        self.steps.begin(argument(inputs, kwargs, 0, "sample"), argument(inputs, kwargs, 1, "timestep"))

    def end(self, model: nn.Module, inputs: tuple, output) -> None:
        self.steps.end()
