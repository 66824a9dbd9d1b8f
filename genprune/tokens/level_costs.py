"""Exact multiply-accumulates of a U-Net whose levels run on fewer tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch

from genprune.costs import meta_copy
from genprune.tokens.choice import Choice, LayerView
from genprune.tokens.methods import TokenMethod
from genprune.tokens.state import TokenState

Counts = dict[int, int]  # level -> image tokens that its reduced blocks run on


@dataclass(frozen=True)
class _FirstTokens(TokenMethod):
    """Keeps the first tokens, at no cost."""

    def choose(self, query, key, keep: int, view: LayerView) -> Choice:
        return Choice(torch.arange(keep, device=query.device).expand(query.shape[0], keep), None)


class LevelCosts:
    """Multiply-accumulates by number of tokens at each level, at the host's operating point.

    A block's are a polynomial of degree 2 in its tokens, so that three counts of a level tell all.

    Attributes:
        dense: of the whole model in full.
    """

    def __init__(self, host):
        self.host = host
        self.dense = counted_levels(host, _FirstTokens(keep=None), {})
        self._saved: dict[int, tuple[list[int], list[int]]] = {}

    def macs(self, counts: Mapping[int, int]) -> int:
        """Of the model with these counts, scoring not included."""
        return self.dense - sum(self.saved(level, count) for level, count in counts.items())

    def saved(self, level: int, count: int) -> int:
        """What the blocks of a level save when they run on `count` tokens."""
        if level not in self._saved:
            full = self.host.tokens[level]
            places = sorted({max(1, full // 4), max(1, full // 2), full})
            method = _FirstTokens(keep=None)
            found = [self.dense - counted_levels(self.host, method, {level: n}) if n < full else 0 for n in places]
            self._saved[level] = places, found
        places, values = self._saved[level]
        total = Fraction(0)
        for i, value in enumerate(values):  # Lagrange
            term = Fraction(value)
            for j, place in enumerate(places):
                if j != i:
                    term *= Fraction(count - place, places[i] - place)
            total += term
        return int(total)


def counted_levels(host, method: TokenMethod, counts: Mapping[int, int]) -> int:
    """Multiply-accumulates of one call on the meta device that scores, scoring included."""
    from torch.utils.flop_counter import FlopCounterMode

    meta = meta_copy(host.model)
    twin = type(host)(meta, host.settings)
    state = TokenState(method, len(host.paths))
    state.schedule = level_schedule(host, counts)
    twin.attach(state)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        meta(**host.example_inputs(meta))
    return counter.get_total_flops() // 2


def level_schedule(host, counts: Mapping[int, int]) -> tuple:
    """One entry for each level: `(after, before)`, or None where nothing goes."""
    return tuple(
        (counts[level], full) if counts.get(level, full) < full else None for level, full in enumerate(host.tokens)
    )
