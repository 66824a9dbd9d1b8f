"""Hooks that shorten the sequence of a plain transformer: blocks in a row, tokens of shape (B, N, C).

The host's own `forward` runs throughout, with its own fused attention; queries and keys are read where they leave the
host's `q_norm` and `k_norm`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genprune.errors import UnsupportedModel
from genprune.tokens.choice import Choice, LayerView
from genprune.tokens.reducing import compose, gather_tokens, reduce_tokens, restore_tokens
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


def usable(mask: Tensor, tokens: int) -> Tensor | None:
    """Which tokens a mask leaves in play, bool `(B or 1, tokens)`: one that may not even look at itself is padding.

    Args:
        mask: bool, or added to the logits; `(..., N, N)`, or `(..., 1, N)` for keys alone.

    Returns:
        None for a mask of another shape, which says nothing about tokens.
    """
    while mask.ndim < 4:
        mask = mask.unsqueeze(0)
    mask = mask[:, 0]  # (B or 1, N or 1, N)
    if mask.shape[-1] != tokens or mask.shape[-2] not in (1, tokens):
        return None
    own = mask[:, 0] if mask.shape[-2] == 1 else mask.diagonal(dim1=-2, dim2=-1)
    return own if own.dtype == torch.bool else own > -1e4  # -inf, or the lowest number of a half-precision type


def scored_bias(bias: Tensor | None) -> Tensor | None:
    """A bias or mask of the attention as a float32 bias of the votes, finite: a row of padding alone is no NaN."""
    if bias is None:
        return None
    if bias.dtype == torch.bool:
        return torch.zeros(bias.shape, device=bias.device).masked_fill_(~bias, -1e30)
    return bias.float().clamp(min=-1e30)


class CallStart:
    """The hook of what runs first in every call, before any block and outside of gradient checkpointing."""

    def __init__(self, state: TokenState):
        self.state = state

    def hook(self, module: nn.Module, inputs: tuple) -> None:
        self.state.grid = self.state.dense


class LayerHooks:
    """The hooks of one block.

    Args:
        state: shared by all blocks of the model.
        layer: index of this block.
        prefix: tokens before the patches.
        class_token: whether the first token is a class token.
        attention: what has the `scale` of queries and keys; None: a block where they are not read.
        bias_argument: keyword of the block that takes an additive attention bias; None: it takes none.
        rotate: `f(q, rope) -> q`, the host's rotary embedding of patches; None: it has none.
        heads_dim: dimension of the heads where queries and keys are read.
    """

    def __init__(
        self,
        state: TokenState,
        layer: int,
        prefix: int,
        class_token: bool,
        attention: nn.Module | None,
        bias_argument: str | None = "attn_mask",
        rotate=None,
        heads_dim: int = 1,
    ):
        self.state, self.layer = state, layer
        self.prefix, self.class_token = prefix, class_token
        self.attention, self.bias_argument, self.rotate, self.heads_dim = attention, bias_argument, rotate, heads_dim

    # ---- what the hooks of a block do, in the order in which they run ------------------------------------------

    def enter(self, block: nn.Module, inputs: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before the block: shorten what it is given beside the hidden states."""
        state, layer = self.state, self.layer
        hidden = inputs[0]
        state.query[layer] = state.key[layer] = state.residual[layer] = None  # what an aborted call left
        if layer == 0:
            state.at[0] = self._first(hidden, kwargs)
        now = state.at[layer]
        if now is None:
            return None
        if now.origin is None:
            if state.schedule[layer] is not None:
                state.rope[layer] = kwargs.get("rope")
                state.bias[layer] = self._causal(kwargs, hidden)
            return None
        kwargs = dict(kwargs)
        if now.grid:
            state.full = hidden
            hidden = gather_tokens(hidden, now.origin, self.prefix)
        if kwargs.get("rope") is not None:
            kwargs["rope"] = gathered_rope(kwargs["rope"], now.origin)
        self._shorten_bias(kwargs, now, hidden)
        if state.schedule[layer] is not None:
            state.rope[layer], state.bias[layer] = kwargs.get("rope"), self._causal(kwargs, hidden)
        return (hidden, *inputs[1:]), kwargs

    def take_query(self, norm: nn.Module, inputs: tuple, query: Tensor) -> None:
        """A block of several attentions has the heads of all side by side."""
        if self.state.schedule[self.layer] is not None:
            query = query.detach().transpose(1, self.heads_dim)
            before = self.state.query[self.layer]
            self.state.query[self.layer] = query if before is None else torch.cat([before, query], 1)

    def take_key(self, norm: nn.Module, inputs: tuple, key: Tensor) -> None:
        if self.state.schedule[self.layer] is not None:
            key = key.detach().transpose(1, self.heads_dim)
            before = self.state.key[self.layer]
            self.state.key[self.layer] = key if before is None else torch.cat([before, key], 1)

    def enter_mlp(self, module: nn.Module, inputs: tuple) -> tuple | None:
        """Between attention and MLP: the MLP runs on the tokens that stay."""
        state, layer = self.state, self.layer
        if state.schedule[layer] is None or state.at[layer] is None or state.method.placement != "before_mlp":
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
            if before.grid:
                grid = self._restored(output, before, grid, "own")
            short = self._reduced(output)
        else:
            state.at[layer + 1], short = before, output
        state.query[layer] = state.key[layer] = state.rope[layer] = state.bias[layer] = state.full = None
        if before.grid:
            return self._restored(short, state.at[layer + 1], grid, state.method.restore)
        return short

    # ---- parts ----------------------------------------------------------------------------------------------------

    def _first(self, hidden: Tensor, kwargs: dict) -> Tokens:
        """What the first layer is given."""
        patches = hidden.shape[1] - self.prefix
        mask = kwargs.get("attn_mask")
        valid = None if mask is None else usable(mask, hidden.shape[1])
        size = None
        if valid is not None:
            valid = valid[:, self.prefix :].expand(hidden.shape[0], patches)
            size = None if self.state.method.reduce == "drop" else valid.float()
        return Tokens(patches, size=size, valid=valid, grid=self.state.grid)

    def _restored(self, short: Tensor, now: Tokens, grid: Tensor, how: str) -> Tensor:
        """The full grid: what is left at its places, and the removed patches as `how` says."""
        if now.origin is None:
            return short
        return restore_tokens(short, now.origin, now.count, self.prefix, how, now.stands, grid[:, self.prefix :])

    def _causal(self, kwargs: dict, hidden: Tensor) -> Tensor | None:
        """The bias that votes are counted with: what the block is given, or the lower triangle."""
        if kwargs.get("is_causal"):
            tokens = hidden.shape[1]
            return torch.ones(tokens, tokens, dtype=torch.bool, device=hidden.device).tril()
        return kwargs.get(self.bias_argument)

    def _shorten_bias(self, kwargs: dict, now: Tokens, hidden: Tensor) -> None:
        """What the host gave, for the tokens that are left, and the log of their sizes."""
        if self.bias_argument is None:
            return
        given = kwargs.get(self.bias_argument)
        if given is not None:
            given = gathered_bias(given, now.origin, self.prefix, self.prefix + now.count)
        sizes = self.log_sizes(now, hidden.dtype)
        if sizes is not None and kwargs.get("is_causal"):  # the fused attention takes a mask or `is_causal`, not both
            given, kwargs["is_causal"] = self._causal(kwargs, hidden), False
        bias = _joined(given, sizes)
        if bias is not None:
            kwargs[self.bias_argument] = bias

    def log_sizes(self, now: Tokens, dtype: torch.dtype) -> Tensor | None:
        """Proportional attention after merges: log of sizes, `(B, 1, 1, N)`, 0 for the prefix."""
        if now.size is None or now.origin is None or not self.state.method.proportional:
            return None
        sizes = now.size.clamp(min=1e-4).log().to(dtype)  # (B, n)
        return torch.cat([sizes.new_zeros(len(sizes), self.prefix), sizes], 1)[:, None, None]

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
        origin = choice.kept if now.origin is None else compose(now.origin, choice.kept)
        stands = now.stands
        if choice.target is not None:
            stands = choice.target if now.origin is None else choice.target.gather(1, now.stands)
        valid = None if now.valid is None else now.valid.gather(1, choice.kept)
        state.at[layer + 1] = Tokens(now.count, origin, stands, size, valid, now.grid)
        return hidden

    @torch.no_grad()
    def _choice(self, keep: int, now: Tokens) -> Choice:
        state, layer = self.state, self.layer
        query, key = self._query_and_key()
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
            bias=scored_bias(state.bias[layer]),
            valid=now.valid,
            size=now.size,
            wants_target=now.grid and state.method.restore == "nearest",
        )
        return state.method.choose(query, key, keep, view)

    def _query_and_key(self) -> tuple[Tensor, Tensor]:
        query, key = self.state.query[self.layer], self.state.key[self.layer]
        if query is None or key is None:
            raise UnsupportedModel(
                f"layer {self.layer} ran, and no queries and keys were seen: its {type(self.attention).__name__} does "
                "not call its q_norm and k_norm; expected one that does. Reduce after others, with layers=(...)."
            )
        return query, key


def _joined(given: Tensor | None, sizes: Tensor | None) -> Tensor | None:
    """The bias that the host gave (bool, or added to the logits) and the log of sizes."""
    if given is None or sizes is None:
        return sizes if given is None else given
    if given.dtype == torch.bool:
        return torch.where(given, sizes, float("-inf"))
    return given + sizes
