"""Hooks that shorten the image tokens of a diffusion transformer: blocks in a row, text in a stream of its own.

The host's own `forward` and fused attention run throughout. Blocks get hidden states as their first argument (or by
keyword) and return them alone, or after the text. Where a rotary embedding is given for the full grid, reduced blocks
get none: each row of a batch may keep other tokens, which the host's embedding has no room for, so that the hooks on
the norms of queries and keys rotate them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genprune.errors import UnsupportedModel
from genprune.tokens.choice import Choice, LayerView
from genprune.tokens.denoising_steps import Steps, fewer
from genprune.tokens.hooks import along
from genprune.tokens.reducing import gather_tokens
from genprune.tokens.spans import Span, Stream, full_grid, returned, shortened
from genprune.tokens.state import TokenState

ROPE = "image_rotary_emb"
Rope = tuple[Tensor, Tensor]  # cos and sin, (n, d) or (B, n, d)


def argument(inputs: tuple, kwargs: dict, place: int, name: str):
    """An argument of a call, given by place or by name; None where it is not given."""
    return inputs[place] if len(inputs) > place else kwargs.get(name)


def with_argument(inputs: tuple, kwargs: dict, place: int, name: str, value) -> tuple[tuple, dict]:
    """The arguments of a call with another value for one of them."""
    if len(inputs) > place:
        return (*inputs[:place], value, *inputs[place + 1 :]), kwargs
    return inputs, {**kwargs, name: value}


def rotated(x: Tensor, rope: Rope) -> Tensor:
    """FLUX's rotary embedding of `(B, n, H, d)`: neighbouring channels are pairs."""
    cos, sin = (part.unsqueeze(-2).to(x.device) for part in rope)  # (n, 1, d) or (B, n, 1, d)
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], -1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def rope_of(rope: Rope, origin: Tensor, text: int) -> Rope:
    """`(text + count, d)` for the text and the tokens that are left: `(B, text + n, d)`."""
    rows = origin.shape[0]
    first = torch.arange(text, device=origin.device).expand(rows, text)
    index = torch.cat([first, origin + text], 1)
    return tuple(part.to(origin.device)[index] for part in rope)


class StreamHooks:
    """The hooks of one block.

    Args:
        state: shared by all blocks of the model.
        steps: shared by all blocks of the model.
        layer: index of this block.
        attention: the block's self-attention, or None: tokens cannot be scored here.
        joined: queries and keys of the attention begin with the text.
        tokens_first: queries and keys leave their norms as `(B, n, H, d)` and not `(B, H, n, d)`.
        rope_place: place of the rotary embedding among the block's arguments; None: it takes none.
        mask_place: place of the self-attention's mask among them; None: it takes none.
    """

    def __init__(
        self,
        state: TokenState,
        steps: Steps,
        layer: int,
        attention: nn.Module | None,
        joined: bool = False,
        tokens_first: bool = False,
        rope_place: int | None = None,
        mask_place: int | None = None,
    ):
        self.state, self.steps, self.layer = state, steps, layer
        self.attention, self.joined, self.tokens_first, self.rope_place = attention, joined, tokens_first, rope_place
        self.mask_place = mask_place
        self._forget()

    def _forget(self) -> None:
        self.query = self.key = self.rope = self.given_rope = self.grid = self.short = None
        self.text = 0

    def __getstate__(self) -> dict:
        """Without the tensors of the last call."""
        names = ("query", "key", "rope", "given_rope", "grid", "short", "text")
        return {name: value for name, value in self.__dict__.items() if name not in names}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget()

    def attach(self, block: nn.Module) -> list:
        handles = [
            block.register_forward_pre_hook(self.enter, with_kwargs=True),
            block.register_forward_hook(self.leave),
        ]
        if self.attention is None:
            return handles
        for name, projection, hook in (("norm_q", "to_q", self.take_query), ("norm_k", "to_k", self.take_key)):
            norm = getattr(self.attention, name, None)
            norm = getattr(self.attention, projection) if norm is None else norm
            handles.append(norm.register_forward_hook(hook))
        if self.rope_place is not None:
            for name in ("norm_added_q", "norm_added_k"):
                if getattr(self.attention, name, None) is not None:
                    handles.append(getattr(self.attention, name).register_forward_hook(self.turn_text))
        return handles

    # ---- in the order in which they run --------------------------------------------------------------------------

    def enter(self, block: nn.Module, inputs: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before the block: it gets what is left of the full grid, and no rotary embedding for more."""
        self._forget()
        hidden = argument(inputs, kwargs, 0, "hidden_states")
        stream = self._stream(hidden)
        if self.rope_place is not None:
            self.text = argument(inputs, kwargs, 1, "encoder_hidden_states").shape[1]
            self.given_rope = argument(inputs, kwargs, self.rope_place, ROPE)
        if stream.origin is None:
            return None
        if self.steps.dense:
            self.grid, self.short = hidden, gather_tokens(hidden, stream.origin, 0)
            inputs, kwargs = with_argument(inputs, kwargs, 0, "hidden_states", self.short)
        if self.given_rope is not None:
            self.rope = rope_of(self.given_rope, stream.origin, self.text)
            inputs, kwargs = with_argument(inputs, kwargs, self.rope_place, ROPE, None)
        if self.mask_place is not None:
            mask = argument(inputs, kwargs, self.mask_place, "attention_mask")  # (B or 1, 1, n)
            if mask is not None:
                mask = along(mask, stream.origin, -1)
                inputs, kwargs = with_argument(inputs, kwargs, self.mask_place, "attention_mask", mask)
        return inputs, kwargs

    def take_query(self, norm: nn.Module, inputs: tuple, query: Tensor) -> Tensor | None:
        query, changed = self._turned(query)
        if self.state.schedule[self.layer] is not None:
            self.query = query.detach()
        return query if changed else None

    def take_key(self, norm: nn.Module, inputs: tuple, key: Tensor) -> Tensor | None:
        key, changed = self._turned(key)
        if self.state.schedule[self.layer] is not None:
            self.key = key.detach()
        return key if changed else None

    def turn_text(self, norm: nn.Module, inputs: tuple, projected: Tensor) -> Tensor | None:
        """Queries or keys of the text, where the host does not rotate them."""
        if self.rope is None:
            return None
        return rotated(projected, tuple(part[..., : self.text, :] for part in self.rope))

    def leave(self, block: nn.Module, inputs: tuple, output):
        """After the block: reduce, and hand on the short stream, or the full grid where that is asked for."""
        text, hidden = output if isinstance(output, tuple) else (None, output)
        stream = self.steps.at[self.layer]
        choice = self._choice(hidden, stream)
        if self.steps.dense:
            after, hidden = stream, self._dense(hidden, stream)
            if choice is not None:
                after = stream.after(choice, None)
        elif choice is not None:
            span = shortened(hidden, choice, self.state.method.reduce)
            after, hidden = stream.after(choice, span), span.short
        else:
            after = stream
        self.steps.at[self.layer + 1] = after
        self._forget()
        return (text, hidden) if isinstance(output, tuple) else hidden

    # ---- parts ---------------------------------------------------------------------------------------------------

    def _stream(self, hidden: Tensor) -> Stream:
        """What this block is given; a block before it may have been skipped."""
        at = self.steps.at
        for layer in range(self.layer, -1, -1):
            if layer in at:
                at[self.layer] = at[layer]
                return at[layer]
        at[self.layer] = Stream(hidden.shape[1])
        return at[self.layer]

    def _turned(self, x: Tensor) -> tuple[Tensor, bool]:
        """Queries or keys as the attention needs them, and whether that is other than what the norm gave."""
        if self.rope is None:
            return x, False
        return rotated(x, self.rope if self.joined else tuple(part[..., self.text :, :] for part in self.rope)), True

    def _dense(self, short: Tensor, stream: Stream) -> Tensor:
        if stream.origin is None:
            return short
        choice = Choice(stream.origin, stream.stands)
        return returned(Span(self.grid, self.short, choice), short, self.steps.settings.restore)

    @torch.no_grad()
    def _choice(self, hidden: Tensor, stream: Stream) -> Choice | None:
        planned = self.state.schedule[self.layer]
        count = hidden.shape[1]
        if planned is None:
            return None
        full = next(kept[1] for kept in self.state.schedule if kept is not None)  # what it was planned for
        keep = fewer(stream.count, max(1, planned[0] * stream.count // full), self.steps.factor)
        if keep >= count:
            return None
        known = self.steps.remembered(self.layer, hidden.shape[0], count, keep)
        if known is not None:
            return known
        query, key = (self._image(x, stream) for x in (self.query, self.key))
        view = LayerView(
            prefix=0,
            class_token=False,
            scale=query.shape[-1] ** -0.5,
            layer=self.layer,
            depth=self.state.depth,
            wants_target=self.steps.settings.restore in ("update", "nearest"),
        )
        return self.steps.choose(self.layer, self.state.method, query, key, keep, view)

    def _image(self, x: Tensor | None, stream: Stream) -> Tensor:
        """Queries or keys of the image alone, rotated, `(B, H, n, d)`."""
        if x is None:
            raise UnsupportedModel(
                f"block {self.layer} ran without calling the layers that make its queries and keys (fused "
                "projections?); expected separate ones. Call unfuse_qkv_projections() on the model."
            )
        if x.ndim == 3:  # no norm: (B, n, H d)
            x = x.unflatten(-1, (self.attention.heads, -1))
        elif not self.tokens_first:
            x = x.transpose(1, 2)
        x = x[:, self.text :] if self.joined else x  # (B, n, H, d)
        if self.rope is None and self.given_rope is not None:  # the host rotates after the norm
            x = rotated(x, tuple(part[..., self.text :, :] for part in self.given_rope))
        return x.transpose(1, 2)


class StreamEnds:
    """The hooks around all blocks: a call begins, and the full grid is back before the model's last norm.

    Args:
        timestep_place: place of the timestep among the model's arguments.
        added: names of arguments of full size that the model adds between blocks (residuals of a ControlNet).
        refused: names of entries of `joint_attention_kwargs` that reduced blocks cannot take.
    """

    def __init__(
        self,
        state: TokenState,
        steps: Steps,
        timestep_place: int,
        added: tuple[str, ...] = (),
        refused: tuple[str, ...] = (),
    ):
        self.state, self.steps = state, steps
        self.timestep_place, self.added, self.refused = timestep_place, added, refused

    def attach(self, model: nn.Module) -> list:
        return [
            model.register_forward_pre_hook(self.begin, with_kwargs=True),
            model.norm_out.register_forward_pre_hook(self.restore),
            model.register_forward_hook(self.end),
        ]

    def begin(self, model: nn.Module, inputs: tuple, kwargs: dict) -> None:
        for name in self.refused:
            if name in (kwargs.get("joint_attention_kwargs") or {}):
                raise UnsupportedModel(
                    f"the call passes '{name}' to the attention of this {type(model).__name__}; expected a call "
                    "without it while tokens are reduced, because its blocks read it at full size. Call "
                    "handle.remove(), or unload the adapter."
                )
        latents = argument(inputs, kwargs, 0, "hidden_states")
        timestep = argument(inputs, kwargs, self.timestep_place, "timestep")
        self.steps.begin(latents, timestep)
        self.steps.dense = any(kwargs.get(name) is not None for name in self.added)

    def restore(self, norm: nn.Module, inputs: tuple) -> tuple | None:
        at = self.steps.at
        if not at or self.steps.dense:
            return None
        stream = at[max(at)]
        if not stream.spans:
            return None
        return (full_grid(stream, inputs[0], self.steps.settings.restore), *inputs[1:])

    def end(self, model: nn.Module, inputs: tuple, output) -> None:
        self.steps.end()
