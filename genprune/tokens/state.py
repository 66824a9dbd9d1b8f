"""What a model with fewer tokens remembers during one forward call: which tokens each layer still holds."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from genprune.tokens.methods import TokenMethod

Kept = tuple[int, int] | None  # (patches after, patches before) at the size that was planned for; None: all stay


class Tokens(NamedTuple):
    """The patches of a sequence before one layer.

    Attributes:
        count: patches of the full grid.
        origin: `(B, n)`, the place of each in the full grid; None: all are there, in order.
        stands: `(B, count)`, for each place of the grid the patch, 0..n-1, that stands for it; None: not tracked.
        size: `(B, n)`, how many patches each one was merged from, 0 for padding; None: 1 each.
        valid: `(B, n)` bool, False for padding; None: no padding.
        grid: layers hand on the full grid, and reduce it for themselves.
    """

    count: int
    origin: Tensor | None = None
    stands: Tensor | None = None
    size: Tensor | None = None
    valid: Tensor | None = None
    grid: bool = False


class TokenState:
    """Shared by all hooks of one model; a deep copy of the model gets its own.

    Everything is indexed by layer and written when that layer runs, so that an aborted call, another image size and
    the second run of a checkpointed block all find what they need. With gradient checkpointing the backward pass has
    to come before the next forward: blocks that run once more find the places of the last call.

    Attributes:
        method: what decides.
        schedule: per layer, how many patches stay: `(after, before)`, or None.
        at: per layer, the `Tokens` before it; one more entry for what leaves the last one.
        query, key: per layer, `(B, H, N, d)` of the layer that runs, where it will be scored.
        rope, bias: per layer, the rotary embedding and the attention bias that it was given.
        residual, branch: per layer, the stream and the MLP's output between two hooks of one block.
        full: the full grid of hidden states between two hooks of one block.
        dense: the next call's layers shall hand on the full grid, and reduce it for themselves.
        grid: the same of the call that runs. Set at its start, because a checkpointed block runs once more when
            `dense` may be another one.
    """

    _of_a_call = ("at", "query", "key", "rope", "bias", "residual", "branch", "full")

    reduces_tokens = True  # what a cut asks the hooks of a model for

    def __init__(self, method: TokenMethod, depth: int):
        self.method = method
        self.depth = depth
        self.schedule: tuple[Kept, ...] = (None,) * depth
        self.dense = self.grid = False
        self.clear()

    def clear(self) -> None:
        """Forget what the last call left."""
        self.at: list[Tokens | None] = [None] * (self.depth + 1)
        self.query: list[Tensor | None] = [None] * self.depth
        self.key: list[Tensor | None] = [None] * self.depth
        self.rope: list[Tensor | None] = [None] * self.depth
        self.bias: list[Tensor | None] = [None] * self.depth
        self.residual: list[Tensor | None] = [None] * self.depth
        self.branch: list[Tensor | None] = [None] * self.depth
        self.full: Tensor | None = None

    def keep(self, layer: int, count: int) -> int:
        """How many of `count` patches this layer hands on; the planned share of them on another image size."""
        kept = self.schedule[layer]
        if kept is None:
            return count
        after, before = kept
        if count == before:
            return after
        # Rounded down, but what takes at most half must not take more: methods that merge pairs cannot.
        least = count - count // 2 if 2 * after >= before else 1
        return max(least, count * after // before)

    def __getstate__(self) -> dict:
        """Without the tensors of the last call."""
        return {name: value for name, value in self.__dict__.items() if name not in self._of_a_call}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.clear()


class Shadow:
    """A callable that stands before a method of one module object, whose class stays as it is.

    For the few places of a host that are no sub-module, so that no hook reaches them. Parameters and the state dict
    do not see it.
    """

    name: str

    def __init__(self, module: nn.Module, state: TokenState):
        self.module, self.state = module, state

    def attach(self) -> Shadow:
        self.module.__dict__[self.name] = self
        return self

    def remove(self) -> None:
        if self.module.__dict__.get(self.name) is self:  # not that of a later reduction
            self.module.__dict__.pop(self.name)

    def host(self, *args, **kwargs):
        """What the class does."""
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)


class CompiledApart(Shadow):
    """Nothing but the host's method, so that a compiled model sees that it is another one.

    `torch.compile` does not look at hooks when it decides whether it has compiled a model, or one like it, before:
    what was compiled without hooks would go on running without them, and say nothing. It does see a method in the way.
    """

    name = "forward_features"

    def __call__(self, *args, **kwargs):
        return self.host(*args, **kwargs)
