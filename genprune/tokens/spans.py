"""Between two ends of a span of blocks fewer tokens run; here is how all of them come back."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from genprune.tokens.choice import Choice
from genprune.tokens.reducing import compose, gather_tokens, reduce_tokens, restore_tokens


class Span(NamedTuple):
    """One reduction.

    Attributes:
        before: hidden states before it, shape `(B, n, C)`.
        short: hidden states after it, shape `(B, n', C)`.
        choice: which tokens stayed.
    """

    before: Tensor
    short: Tensor
    choice: Choice


class Stream(NamedTuple):
    """The image tokens before one block.

    Attributes:
        count: tokens of the full grid.
        origin: `(B, n)`, the place of each in the full grid; None: all are there.
        stands: `(B, count)`, for each place of the grid the token, 0..n-1, that stands for it; None: not known.
        spans: reductions so far, the first one first.
    """

    count: int
    origin: Tensor | None = None
    stands: Tensor | None = None
    spans: tuple[Span, ...] = ()

    def after(self, choice: Choice, span: Span | None) -> Stream:
        """The stream after another reduction."""
        if self.origin is None:
            origin, stands = choice.kept, choice.target
        else:
            origin = compose(self.origin, choice.kept)
            known = self.stands is not None and choice.target is not None
            stands = choice.target.gather(1, self.stands) if known else None
        return Stream(self.count, origin, stands, self.spans if span is None else (*self.spans, span))


def shortened(hidden: Tensor, choice: Choice, how: str) -> Span:
    """A reduction of `(B, n, C)`; `how` is the method's `reduce`."""
    short, _ = reduce_tokens(hidden, choice, 0, how)
    return Span(hidden, short, choice)


def returned(span: Span, after: Tensor, how: str) -> Tensor:
    """All tokens of one span, `(B, n, C)`, when those that ran came out as `after`, `(B, n', C)`.

    Args:
        span: the reduction.
        after: what became of `span.short`.
        how: see `genprune.tokens.diffusion.DiffusionTokens.restore`.
    """
    target = span.choice.target
    if how == "update" and target is not None:
        return span.before + gather_tokens(after - span.short, target, 0)
    if how in ("update", "nearest") and target is None:  # only methods that choose nothing, for counting, have none
        how = "own"
    return restore_tokens(after, span.choice.kept, span.before.shape[1], 0, how, target, span.before)


def full_grid(stream: Stream, after: Tensor, how: str) -> Tensor:
    """All tokens of a stream: its reductions are taken back one by one, the last one first."""
    for span in reversed(stream.spans):
        after = returned(span, after, how)
    return after
