"""Hooks that shorten the sequence of a plain transformer: blocks in a row, tokens of shape (B, N, C).

The host's own `forward` runs throughout, with its own fused attention; queries and keys are read where they leave the
host's `q_norm` and `k_norm`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genprune.tokens.choice import Choice, LayerView
from genprune.tokens.reducing import gather_tokens, reduce_tokens, restore_tokens
from genprune.tokens.state import Tokens, TokenState


def along(values: Tensor, index: Tensor, dim: int) -> Tensor:
    """`values` at the places `index`, `(B, n)`, along one dimension; the first dimension is the batch, or 1."""
    dim = dim % values.ndim
    rows = index.shape[0]
    if values.shape[0] != rows:
        values = values.expand(rows, *values.shape[1:])
    shape = [1] * values.ndim
    shape[0], shape[dim] = rows, index.shape[1]
    return values.gather(
        dim, index.reshape(shape).expand(*values.shape[:dim], index.shape[1], *values.shape[dim + 1 :])
    )


def with_prefix(index: Tensor, prefix: int) -> Tensor:
    """Places of patches, `(B, n)`, as places of tokens, `(B, prefix + n)`."""
    first = torch.arange(prefix, device=index.device).expand(index.shape[0], prefix)
    return torch.cat([first, index + prefix], 1)


def gathered_rope(rope: Tensor, origin: Tensor) -> Tensor:
    """A rotary embedding for the patches that are left: `(n, D)`, `(H, n, D)` or `(B, H, n, D)` to `(B, H, n', D)`."""
    while rope.ndim < 4:
        rope = rope.unsqueeze(0)
    return along(rope, origin, -2)


def gathered_bias(bias: Tensor, origin: Tensor, prefix: int, tokens: int) -> Tensor:
    """An attention bias or mask for the tokens that are left: every axis that runs over all `tokens` is gathered."""
    while bias.ndim < 4:
        bias = bias.unsqueeze(0)
    index = with_prefix(origin, prefix)
    for dim in (-2, -1):
        if bias.shape[dim] == tokens:
            bias = along(bias, index, dim)
    return bias


class LayerHooks:
    """The hooks of one block.

    Args:
        state: shared by all blocks of the model.
        layer: index of this block.
        prefix: tokens before the patches.
        class_token: whether the first token is a class token.
        attention: the block's attention; it has `scale`.
        bias_argument: keyword of the block that takes an additive attention bias; None: it takes none.
        rotate: `f(q, rope) -> q`, the host's rotary embedding of patches; None: it has none.
    """

    def __init__(
        self,
        state: TokenState,
        layer: int,
        prefix: int,
        class_token: bool,
        attention: nn.Module,
        bias_argument: str | None = "attn_mask",
        rotate=None,
    ):
        self.state, self.layer = state, layer
        self.prefix, self.class_token = prefix, class_token
        self.attention, self.bias_argument, self.rotate = attention, bias_argument, rotate

    # ---- what the hooks of a block do, in the order in which they run ------------------------------------------

    def enter(self, block: nn.Module, inputs: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before the block: shorten what it is given beside the hidden states."""
        state, layer = self.state, self.layer
        hidden = inputs[0]
        if layer == 0:
            state.at[0] = Tokens(hidden.shape[1] - self.prefix)
        now = state.at[layer]
        if now is None or now.origin is None:
            if state.schedule[layer] is not None:
                state.rope[layer] = kwargs.get("rope")
                state.bias[layer] = kwargs.get(self.bias_argument)
            return None
        kwargs = dict(kwargs)
        if state.dense:
            state.full = hidden
            hidden = gather_tokens(hidden, now.origin, self.prefix)
        if kwargs.get("rope") is not None:
            kwargs["rope"] = gathered_rope(kwargs["rope"], now.origin)
        bias = self._bias(kwargs.get(self.bias_argument), now, hidden)
        if bias is not None:
            kwargs[self.bias_argument] = bias
        if state.schedule[layer] is not None:
            state.rope[layer], state.bias[layer] = kwargs.get("rope"), bias
        return (hidden, *inputs[1:]), kwargs

    def take_query(self, norm: nn.Module, inputs: tuple, query: Tensor) -> None:
        if self.state.schedule[self.layer] is not None:
            self.state.query[self.layer] = query.detach()

    def take_key(self, norm: nn.Module, inputs: tuple, key: Tensor) -> None:
        if self.state.schedule[self.layer] is not None:
            self.state.key[self.layer] = key.detach()

    def enter_mlp(self, module: nn.Module, inputs: tuple) -> tuple | None:
        """Between attention and MLP: the MLP runs on the tokens that stay."""
        state, layer = self.state, self.layer
        if state.schedule[layer] is None or state.method.placement != "before_mlp":
            return None
        hidden = self._reduced(inputs[0])
        state.residual[layer] = hidden
        return (hidden, *inputs[1:])

    def leave_mlp(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        """The host adds this to the long sequence, which `leave` throws away: one row is enough."""
        if self.state.residual[self.layer] is None:
            return None
        self.state.branch[self.layer] = output
        return output[:, :1]

    def leave(self, block: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        """After the block: reduce, and hand on the short sequence, or the full grid where that is asked for."""
        state, layer = self.state, self.layer
        before = state.at[layer]
        if before is None:
            return None
        grid = inputs[0] if before.origin is None else state.full
        if state.residual[layer] is not None:
            short = state.residual[layer] + state.branch[layer]
            state.residual[layer] = state.branch[layer] = None
        elif state.schedule[layer] is not None:
            if state.dense:
                grid = self._restored(output, before, grid, "own")
            short = self._reduced(output)
        else:
            state.at[layer + 1], short = before, output
        state.query[layer] = state.key[layer] = state.rope[layer] = state.bias[layer] = None
        if state.dense:
            return self._restored(short, state.at[layer + 1], grid, state.method.restore)
        return short

    # ---- parts ----------------------------------------------------------------------------------------------------

    def _restored(self, short: Tensor, now: Tokens, grid: Tensor, how: str) -> Tensor:
        """The full grid: what is left at its places, and the removed patches as `how` says."""
        if now.origin is None:
            return short
        return restore_tokens(short, now.origin, now.count, self.prefix, how, now.stands, grid[:, self.prefix :])

    def _bias(self, given: Tensor | None, now: Tokens, hidden: Tensor) -> Tensor | None:
        """The bias that the block gets: what the host gave, for the tokens that are left, and the log of sizes."""
        if given is not None:
            given = gathered_bias(given, now.origin, self.prefix, self.prefix + now.count)
        if now.size is None or not self.state.method.proportional:
            return given
        sizes = now.size.log().to(hidden.dtype)  # (B, n)
        sizes = torch.cat([sizes.new_zeros(len(sizes), self.prefix), sizes], 1)[:, None, None]  # (B, 1, 1, N)
        if given is None:
            return sizes
        return sizes.masked_fill(~given, float("-inf")) if given.dtype == torch.bool else given + sizes

    def _reduced(self, hidden: Tensor) -> Tensor:
        """Choose among the patches by the queries and keys of this layer, and reduce; `(B, N, C)` to `(B, N', C)`."""
        state, layer = self.state, self.layer
        now = state.at[layer]
        count = hidden.shape[1] - self.prefix
        keep = state.keep(layer, count)
        if keep >= count:
            state.at[layer + 1] = now
            return hidden
        choice = self._choice(keep, now)
        hidden, size = reduce_tokens(hidden, choice, self.prefix, state.method.reduce, now.size)
        origin = choice.kept if now.origin is None else now.origin.gather(1, choice.kept)
        stands = now.stands
        if choice.target is not None:
            stands = choice.target if now.origin is None else choice.target.gather(1, now.stands)
        state.at[layer + 1] = Tokens(now.count, origin, stands, size)
        return hidden

    @torch.no_grad()
    def _choice(self, keep: int, now: Tokens) -> Choice:
        state, layer = self.state, self.layer
        query, key = state.query[layer], state.key[layer]
        if key.shape[1] != query.shape[1]:  # grouped-query attention
            key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        if state.rope[layer] is not None:
            query, key = self.rotate(query, state.rope[layer]), self.rotate(key, state.rope[layer])
        view = LayerView(
            prefix=self.prefix,
            class_token=self.class_token,
            scale=self.attention.scale,
            layer=layer,
            depth=state.depth,
            bias=state.bias[layer],
            size=now.size,
            wants_target=state.method.restore == "nearest",
        )
        return state.method.choose(query, key, keep, view)
