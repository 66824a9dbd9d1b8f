"""What fewer tokens cost: exact multiply-accumulates of every layer as a function of how many tokens it is given."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch

from genprune.costs import meta_copy
from genprune.tokens.choice import Choice, LayerView
from genprune.tokens.hosts import TokenHost, host_of
from genprune.tokens.methods import TokenMethod
from genprune.tokens.pagerank import steps_at
from genprune.tokens.schedule import per_layer
from genprune.tokens.state import Kept, TokenState

_SMALL = 1_000_000  # entries of an attention map of all heads


@dataclass(frozen=True)
class _Seen:
    """What a method is given at one layer, for an image of the model's own size."""

    layer: int
    query: tuple[int, ...]
    key: tuple[int, ...]
    view: LayerView

    def cost(self, method: TokenMethod, before: int, after: int) -> int:
        """Multiply-accumulates of choosing `after` patches among `before`."""
        from torch.utils.flop_counter import FlopCounterMode

        tokens = self.view.prefix + before
        # Small maps are counted faster by computing them: many kernels have their meta form in Python.
        device = "cpu" if self.query[1] * tokens**2 <= _SMALL else "meta"
        query, key = (torch.zeros(*shape[:2], tokens, shape[3], device=device) for shape in (self.query, self.key))
        wants = self.view.wants_target and method.restore == "nearest"
        view = replace(self.view, bias=None, valid=None, size=None, wants_target=wants)
        counter = FlopCounterMode(display=False)
        with counter:
            method.choose(query, key, after, view)
        return counter.get_total_flops() // 2


@dataclass(frozen=True)
class _FirstTokens(TokenMethod):
    """Keeps the first patches, at no cost, and notes what it was asked."""

    seen: list[_Seen] = field(default_factory=list)

    def choose(self, query, key, keep: int, view: LayerView) -> Choice:
        self.seen.append(_Seen(view.layer, tuple(query.shape), tuple(key.shape), view))
        rows, patches = query.shape[0], query.shape[2] - view.prefix
        target = torch.zeros(rows, patches, dtype=torch.int64, device=query.device) if view.wants_target else None
        return Choice(torch.arange(keep, device=query.device).expand(rows, keep), target)


class TokenCosts:
    """Multiply-accumulates of a host's layers by number of patches, at its own image size and batch 1.

    Attention is quadratic in the tokens and an MLP linear, so that three counts of the model on the meta device say
    what any number costs, to the last multiply-accumulate. What scoring costs is counted beside it, by calling the
    method on meta tensors of the layer's shapes.

    Attributes:
        dense: multiply-accumulates of the model without reduction.
    """

    def __init__(self, host: TokenHost):
        self.host = host
        self.depth = len(host.paths)
        first = host.scored[0]  # layers up to this one always get all patches
        full = host.patches
        places = sorted({*range(1, min(full, 3) + 1), max(1, full // 4), max(1, full // 2), full})[-3:]
        self._scored: dict[int, _Seen] = {}
        runs = [counted(host, _FirstTokens(keep=None), {first: n} if n < full else {}) for n in places]
        inside = [[_within(run, path) for path in host.paths] for run in runs]
        mlps = [[_within(run, f"{path}.mlp") for path in host.paths] for run in runs]
        self._attention, self._mlp = [], []
        for layer in range(self.depth):
            mlp = [mlps[run][layer] for run in range(len(places))]
            attention = [inside[run][layer] - mlp[run] for run in range(len(places))]
            if layer == first:  # what it hands on to its own MLP may be fewer
                mlp = [Fraction(mlp[-1] * (host.prefix + n), host.prefix + full) for n in places]
            self._attention.append(_polynomial(places, attention))
            self._mlp.append(_polynomial(places, mlp))
        self._rest = _polynomial(places, [run[""] - sum(blocks) for run, blocks in zip(runs, inside)])
        self.dense = runs[-1][""]
        self._known: dict[tuple, int] = {}
        self._parabolas: dict[tuple, tuple[int, ...]] = {}

    def layers(self, counts: Mapping[int, int], placement: str = "after_block") -> list[tuple[int, int]]:
        """Per layer: patches that it is given, and its multiply-accumulates, scoring not included."""
        now, rows = self.host.patches, []
        for layer in range(self.depth):
            after = counts.get(layer, now)
            inner = after if placement == "before_mlp" else now
            rows.append((now, _value(self._attention[layer], now) + _value(self._mlp[layer], inner)))
            now = after
        return rows

    def macs(self, counts: Mapping[int, int], placement: str = "after_block") -> int:
        """Multiply-accumulates of the model with these counts, scoring not included."""
        last = min(counts.values(), default=self.host.patches)
        return sum(macs for _, macs in self.layers(counts, placement)) + _value(self._rest, last)

    def scoring(self, counts: Mapping[int, int], method: TokenMethod) -> list[int]:
        """Per layer: multiply-accumulates of choosing what it hands on; 0 where nothing goes."""
        settings = scoring_settings(method)
        schedule = per_layer(counts, self.host)
        return [self._choosing(layer, kept, method, settings) for layer, kept in enumerate(schedule)]

    def total(self, counts: Mapping[int, int], method: TokenMethod) -> int:
        """Multiply-accumulates of the model with these counts, scoring included."""
        return self.macs(counts, method.placement) + sum(self.scoring(counts, method))

    def rough(self, counts: Mapping[int, int], method: TokenMethod) -> int:
        """`total` with the scoring of each layer by a parabola: microseconds, and near enough to search with."""
        total = self.macs(counts, method.placement)
        for layer, kept in enumerate(per_layer(counts, self.host)):
            if kept is not None:
                total += max(0, _value(self._parabola(layer, method), kept[1]))
        return total

    def _parabola(self, layer: int, method: TokenMethod) -> tuple[int, ...]:
        """Multiply-accumulates of choosing three quarters of the patches, by number of patches."""
        share = getattr(method, "similarity_share", 0)
        if 0 < share < 1:  # how much the similarity stage removes hardly matters, only that it runs
            method = method.changed(similarity_share=0.5)
        key = (self._kind(layer), scoring_settings(method))
        if key not in self._parabolas:
            full = self.host.patches
            places = sorted({max(2, full * quarter // 4) for quarter in (2, 3, 4)} if full > 1 else {1})
            values = [self._choosing(layer, (max(1, n * 3 // 4), n), method, key[1]) for n in places]
            self._parabolas[key] = _polynomial(places, values)
        return self._parabolas[key]

    def _kind(self, layer: int) -> tuple:
        """What is alike in layers where choosing costs the same."""
        seen = self._seen(layer)
        return seen.query, seen.key, steps_at((0, 1, 2), layer, self.depth)

    def _choosing(self, layer: int, kept: Kept, method: TokenMethod, settings: str) -> int:
        if kept is None:
            return 0
        after, before = kept
        key = (self._kind(layer), before, after, settings)
        if key not in self._known:
            self._known[key] = self._seen(layer).cost(method, before, after)
        return self._known[key]

    def _seen(self, layer: int) -> _Seen:
        """Shapes of queries and keys, found by a call in which every layer hands on one patch less."""
        waiting = [one for one in self.host.scored if one not in self._scored]
        while waiting and layer not in self._scored:
            now = waiting[: max(1, self.host.patches - 1)]
            probe = _FirstTokens(keep=None, restore="nearest")  # does this host ask for what stands for a patch?
            counted(self.host, probe, {one: self.host.patches - 1 - i for i, one in enumerate(now)})
            self._scored |= {seen.layer: seen for seen in probe.seen}
            waiting = waiting[len(now) :]
        return self._scored[layer]


def scoring_settings(method: TokenMethod) -> str:
    """What of a method scoring may depend on, as text: all but how much stays and where."""
    return json.dumps({**method.to_json(), "keep": None, "layers": None, "r": None}, sort_keys=True)


def _polynomial(places: Sequence[int], values: Sequence[int | Fraction]) -> tuple[int, ...]:
    """The polynomial through some points (Lagrange): its coefficients, lowest first, and their common denominator."""
    total = [Fraction(0)] * len(places)
    for i, value in enumerate(values):
        term = [Fraction(value)]
        for j, place in enumerate(places):
            if j != i:  # times (n - place) / (places[i] - place)
                width = places[i] - place
                term = [(low - place * high) / width for low, high in zip([Fraction(0), *term], [*term, Fraction(0)])]
        total = [a + b for a, b in zip(total, term)]
    common = math.lcm(*(number.denominator for number in total))
    return (*(int(number * common) for number in total), common)


def _value(polynomial: tuple[int, ...], patches: int) -> int:
    value = 0
    for coefficient in reversed(polynomial[:-1]):
        value = value * patches + coefficient
    return value // polynomial[-1]


def counted(host: TokenHost, method: TokenMethod, counts: Mapping[int, int]) -> dict[str, int]:
    """Multiply-accumulates by module path (`""` is the model), scoring included, of one call on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    meta = meta_copy(host.model)
    twin = host_of(meta)
    state = TokenState(method, len(host.paths))
    state.schedule = per_layer(counts, host)
    attached = twin.attach(state)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        meta(**host.example_inputs(meta))
    for hook in attached:
        hook.remove()
    root = type(meta).__name__
    inside = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    return {name.removeprefix(f"{root}."): macs for name, macs in inside.items() if name.startswith(f"{root}.")} | {
        "": inside["Global"]
    }


def _within(macs: Mapping[str, int], path: str) -> int:
    """A module's own count; 0 for one that did nothing countable."""
    return macs.get(path, 0)


def reference_flops(
    dim: int,
    depth: int,
    counts: Mapping[int, int],
    patches: int = 196,
    prefix: int = 1,
    patch: int = 16,
    channels: int = 3,
    mlp_ratio: int = 4,
    classes: int = 1000,
) -> int:
    """Cost of a plain ViT in the counting of Zero-TPrune's author: a multiply-accumulate is 1, a norm 5 N C.

    Only for comparison with published tables; `TokenCosts` counts the model itself, and norms as 0.
    """
    total, now = patches * channels * patch**2 * dim, patches
    for layer in range(depth):
        tokens = now + prefix
        total += 4 * tokens * dim**2 + 2 * tokens**2 * dim + 2 * mlp_ratio * tokens * dim**2 + 10 * tokens * dim
        now = counts.get(layer, now)
    return total + 5 * (now + prefix) * dim + dim * classes
