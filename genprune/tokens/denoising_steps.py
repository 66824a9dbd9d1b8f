"""What the hooks of a denoiser know across calls: the place in the chain, and choices that are used again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from genprune.tokens.choice import Choice, LayerView
from genprune.tokens.diffusion import DiffusionTokens
from genprune.tokens.methods import TokenMethod


class Remembered(NamedTuple):
    """A choice and what it was made for."""

    choice: Choice
    rows: int
    tokens: int
    keep: int


class Steps:
    """Shared by all hooks of one denoiser; a deep copy of the model gets its own.

    `begin` is called before every call of the denoiser, and decides for that call.

    Attributes:
        settings: how the method is used.
        groups: rows of the batch come in so many parts that show the same latents, and share choices.
        reuse: choices of an earlier call are taken where they fit.
        in_full: where something runs in full in order to be scored, it does so in this call, also when the choice is
            known: the two calls of a guided step are alike.
        factor: which share of the tokens that would be removed is removed.
        dense: blocks hand on the full grid (something of full size is added between them).
        at: per layer, what it is given in this call.
        chosen: per layer (or level), the last choice.
    """

    def __init__(self, settings: DiffusionTokens):
        self.settings = settings
        self.reset()

    def reset(self) -> None:
        """Forget every earlier call."""
        self.groups, self.reuse, self.in_full, self.factor, self.dense = 1, False, True, 1.0, False
        self._remembers = False
        self.at: dict = {}
        self.chosen: dict[int, Remembered] = {}
        self._latents: Tensor | None = None
        self._timestep = self._first = self._step = None

    def begin(self, latents: Tensor, timestep) -> None:
        """A call of the denoiser starts.

        Args:
            latents: its input, shape `(B, ...)`.
            timestep: a number, or a tensor of one or B numbers, which falls along a chain.
        """
        settings = self.settings
        self.at.clear()
        self.groups, self.reuse, self.in_full, self.factor = 1, False, True, 1.0
        # Inside a graph no value can be looked at, and on the meta device there is none.
        blind = latents.device.type == "meta" or (torch.compiler.is_compiling() and not settings.counts_steps)
        self._remembers = not blind and (settings.counts_steps or settings.guidance != "apart")
        if settings.guidance == "shared" and latents.shape[0] % 2 == 0:
            self.groups = 2
        if not self._remembers:
            return
        latents = latents.detach()
        if settings.guidance == "auto":
            self.groups = next((parts for parts in (2, 3) if _repeats(latents, parts)), 1)
        now = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        same = self._latents is not None and _equal(latents, self._latents)
        if self._timestep is None or now > self._timestep:  # a new chain
            self.chosen.clear()
            self._first, self._step = now, 0
        elif now < self._timestep:
            self._step += 1
            self.reuse = self._step % settings.every != 0
        else:  # the other half of guidance, or an inner call of a solver
            self.reuse = settings.guidance != "apart" and same
        if self.reuse:
            self.in_full = self._step % settings.every == 0
        self._latents, self._timestep = latents, now
        self.factor = settings.factor_at(1 - now / self._first if self._first else 1.0)

    def end(self) -> None:
        """The call is over: its hidden states go, unless a backward pass may run parts of it again."""
        if not torch.is_grad_enabled():
            self.at.clear()

    def remembered(self, place: int, rows: int, tokens: int, keep: int) -> Choice | None:
        """The choice of an earlier call, where it is to be taken and fits; where not, none is taken in this call."""
        if not self.reuse:
            return None
        known = self.chosen.get(place)
        if known is not None and known[1:] == (rows, tokens, keep):
            return known.choice
        self.reuse = False  # later choices are made among the tokens that this one leaves
        return None

    def choose(
        self, place: int, method: TokenMethod, query: Tensor, key: Tensor, keep: int, view: LayerView
    ) -> Choice:
        """A new choice at a layer or level; queries and keys have shape `(B, H, n, d)`."""
        rows, tokens = query.shape[0], query.shape[2]
        groups = self.groups if rows % self.groups == 0 else 1
        choice = method.choose(heads_of_groups(query, groups), heads_of_groups(key, groups), keep, view)
        if groups > 1:
            target = choice.target if choice.target is None else choice.target.repeat(groups, 1)
            choice = Choice(choice.kept.repeat(groups, 1), target)
        if self._remembers:
            self.chosen[place] = Remembered(choice, rows, tokens, keep)
        return choice

    def __getstate__(self) -> dict:
        """Without what earlier calls left."""
        return {"settings": self.settings}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["settings"])


def heads_of_groups(x: Tensor, groups: int) -> Tensor:
    """Rows that share a choice as further heads of one attention graph: `(g b, H, n, d)` to `(b, g H, n, d)`."""
    if groups == 1:
        return x
    rows, heads, tokens, width = x.shape
    x = x.reshape(groups, rows // groups, heads, tokens, width).transpose(0, 1)
    return x.reshape(rows // groups, groups * heads, tokens, width)


def fewer(tokens: int, keep: int, factor: float) -> int:
    """How many of the tokens stay when only `factor` of those that would be removed are; at least 1."""
    return max(1, min(tokens, tokens - round(factor * (tokens - keep))))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)


def _repeats(latents: Tensor, parts: int) -> bool:
    """Whether the batch is `parts` times the same rows."""
    rows = latents.shape[0]
    if rows < parts or rows % parts:
        return False
    first, *others = latents.chunk(parts)
    return all(torch.equal(first, other) for other in others)
