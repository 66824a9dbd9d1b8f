"""What fewer tokens cost: exact multiply-accumulates of every layer as a function of how many tokens it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from genprune.costs import meta_copy
from genprune.tokens.choice import Choice, LayerView
from genprune.tokens.hosts import TokenHost, host_of
from genprune.tokens.methods import TokenMethod
from genprune.tokens.schedule import per_layer
from genprune.tokens.state import TokenState


@dataclass(frozen=True)
class _FirstTokens(TokenMethod):
    """Keeps the first patches, at no cost."""

    def choose(self, query, key, keep: int, view: LayerView) -> Choice:
        return Choice(torch.arange(keep, device=query.device).expand(query.shape[0], keep), None)


class TokenCosts:
    """Multiply-accumulates of a host's layers by number of patches, at its own image size and batch 1.

    Attention is quadratic in the tokens and an MLP linear, so that three counts of the model on the meta device say
    what any number costs, to the last multiply-accumulate. Scoring is not included: `counted` has it.
    """

    def __init__(self, host: TokenHost):
        self.host = host
        self.depth = len(host.paths)
        self.places = sorted({host.patches, max(1, host.patches // 2), max(1, host.patches // 4)})
        runs = [counted(host, _FirstTokens(keep=None), {0: n} if n < host.patches else {}) for n in self.places]
        inside = [[_within(run, path) for path in host.paths] for run in runs]
        mlps = [[_within(run, f"{path}.mlp") for path in host.paths] for run in runs]
        self._attention = [[whole[i] - mlp[i] for whole, mlp in zip(inside, mlps)] for i in range(self.depth)]
        self._mlp = [[mlp[i] for mlp in mlps] for i in range(self.depth)]
        self._rest = [run[""] - sum(blocks) for run, blocks in zip(runs, inside)]
        self.dense = runs[-1][""]
        # The first layer always gets all patches, whatever it hands on.
        self._attention[0] = [self._attention[0][-1]] * len(runs)
        self._mlp[0] = [
            Fraction(self._mlp[0][-1] * (host.prefix + n), host.prefix + host.patches) for n in self.places
        ]

    def layers(self, counts: Mapping[int, int], placement: str = "after_block") -> list[tuple[int, int]]:
        """Per layer: patches that it is given, and its multiply-accumulates."""
        now, rows = self.host.patches, []
        for layer in range(self.depth):
            after = counts.get(layer, now)
            inner = after if placement == "before_mlp" else now
            macs = self._at(self._attention[layer], now) + self._at(self._mlp[layer], inner)
            rows.append((now, int(macs)))
            now = after
        return rows

    def macs(self, counts: Mapping[int, int], placement: str = "after_block") -> int:
        """Multiply-accumulates of the model with these counts, scoring not included."""
        last = min(counts.values(), default=self.host.patches)
        blocks = sum(macs for _, macs in self.layers(counts, placement))
        return blocks + int(self._at(self._rest, last))

    def _at(self, values: Sequence[int | Fraction], patches: int) -> Fraction:
        """The polynomial through the counted places (Lagrange), in exact fractions."""
        total = Fraction(0)
        for i, value in enumerate(values):
            term = Fraction(value)
            for j, place in enumerate(self.places):
                if j != i:
                    term *= Fraction(patches - place, self.places[i] - place)
            total += term
        return total


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
