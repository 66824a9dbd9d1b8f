"""Exact multiply-accumulates of a U-Net whose levels run on fewer tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch

from genprune.costs import meta_copy
from genprune.tokens.choice import Choice, LayerView
from genprune.tokens.methods import TokenMethod
from genprune.tokens.state import TokenState

Counts = dict[int, int]  # level -> image tokens that its reduced blocks run on
QUARTERS = (4, 2, 1)  # tokens are counted at 1/4, 1/2 and 1/1 of the full grid


@dataclass(frozen=True)
class _FirstTokens(TokenMethod):
    """Keeps the first tokens, at no cost, and notes what it was asked."""

    seen: list[tuple[tuple[int, ...], LayerView]] = field(default_factory=list)

    def choose(self, query, key, keep: int, view: LayerView) -> Choice:
        self.seen.append((tuple(query.shape), view))
        return Choice(torch.arange(keep, device=query.device).expand(query.shape[0], keep), None)


class LevelCosts:
    """Multiply-accumulates by number of tokens at each level, at the host's operating point and batch 1.

    A block's are a polynomial of degree 2 in its tokens, so that three counts of the model tell all.

    Attributes:
        dense: of the whole model in full.
    """

    def __init__(self, host):
        self.host = host
        probe = _FirstTokens(keep=None)
        runs = []
        for part in QUARTERS:
            counts = {level: max(1, host.tokens[level] // part) for level in host.scored}
            runs.append((counts, _counted(host, probe, {} if part == 1 else counts)))
        self.dense = runs[-1][1][""]
        self._points: dict[int, dict[int, int]] = {}  # level -> tokens -> multiply-accumulates saved
        for level in host.scored:
            macs = {counts[level]: sum(run.get(path, 0) for path in host.blocks[level]) for counts, run in runs}
            self._points[level] = {n: macs[host.tokens[level]] - value for n, value in macs.items()}
        self._seen = dict(zip(host.scored, probe.seen[: len(host.scored)]))

    def macs(self, counts: Mapping[int, int]) -> int:
        """Of a step that scores, with these counts, scoring not included."""
        return self.dense - sum(self.saved(level, count) for level, count in counts.items())

    def total(self, counts: Mapping[int, int], method: TokenMethod) -> int:
        """The same, scoring included."""
        return self.macs(counts) + sum(self.scoring(level, count, method) for level, count in counts.items())

    def reusing(self, counts: Mapping[int, int]) -> int:
        """Of a step that takes earlier choices: the first block of each level runs on fewer tokens too."""
        firsts = (self.saved(n, count) // (len(self.host.blocks[n]) - 1) for n, count in counts.items())
        return self.macs(counts) - sum(firsts)

    def saved(self, level: int, count: int) -> int:
        """What the blocks of a level save when all but the first of them run on `count` tokens."""
        points = self._points[level]
        total = Fraction(0)
        for place, value in points.items():  # Lagrange
            term = Fraction(value)
            for other in points:
                if other != place:
                    term *= Fraction(count - other, place - other)
            total += term
        return int(total)

    def scoring(self, level: int, count: int, method: TokenMethod) -> int:
        """What choosing `count` tokens takes."""
        from torch.utils.flop_counter import FlopCounterMode

        if count >= self.host.tokens[level]:
            return 0
        shape, view = self._seen[level]
        query, key = (torch.empty(shape, device="meta") for _ in range(2))
        wants = self.host.settings.restore in ("update", "nearest")
        with FlopCounterMode(display=False) as counter:
            method.choose(query, key, count, replace(view, wants_target=wants))
        return counter.get_total_flops() // 2


def _counted(host, method: TokenMethod, counts: Mapping[int, int]) -> dict[str, int]:
    """Multiply-accumulates by module path (`""` is the model) of one call on the meta device that scores."""
    from torch.utils.flop_counter import FlopCounterMode

    meta = meta_copy(host.model)
    twin = type(host)(meta, replace(host.settings, guidance="apart"))
    state = TokenState(method, len(host.paths))
    state.schedule = level_schedule(host, counts)
    twin.attach(state)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        meta(**host.example_inputs(meta))
    root = type(meta).__name__
    inside = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    return {name.removeprefix(f"{root}."): macs for name, macs in inside.items()} | {"": inside["Global"]}


def level_schedule(host, counts: Mapping[int, int]) -> tuple:
    """One entry for each level: `(after, before)`, or None where nothing goes."""
    return tuple(
        (counts[level], full) if counts.get(level, full) < full else None for level, full in enumerate(host.tokens)
    )
