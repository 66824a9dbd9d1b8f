"""What a search over token counts draws, changes and crosses: layers, how much goes in each, the similarity share."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from genprune.tokens.schedule import Counts, fitted

_STEEPEST = 12.0  # exp(-12) of a grid is less than a patch


@dataclass(frozen=True)
class Candidate:
    """One point of the search. It has no budget of its own: a budget says how far it is turned down.

    Args:
        weights: per layer that reduces, how much of what it is given goes there, relative to the other layers, > 0.
        similarity_share: of the method; None where it has none.
    """

    weights: Mapping[int, float]
    similarity_share: float | None

    def counts(
        self,
        budget: float,
        share: Callable[[Counts], float],
        patches: int,
        least: int,
        what: str,
        floor: Callable[[int], int] = lambda patches: 1,
    ) -> Counts:
        """The counts under a budget: each layer hands on `exp(-t w)` of its patches, `least` or more.

        Args:
            budget: share of the dense cost.
            share: counts to their share of the dense cost.
            patches, least: of the full grid, and what has to stay to the end.
            what: the cost's name in messages.
            floor: what a layer has to hand on of what it is given.

        Raises:
            BudgetUnreachable: these layers cannot save so much.
        """

        def rule(part: float) -> Counts:
            now, counts, strength = patches, {}, _STEEPEST * (1 - part) ** 2
            for layer in sorted(self.weights):
                now = max(min(least, now), floor(now), int(now * math.exp(-strength * self.weights[layer])))
                counts[layer] = now
            return counts

        counts = fitted(budget, share, patches, rule, what)
        before = [patches, *counts.values()]
        return {layer: count for (layer, count), given in zip(counts.items(), before) if count < given}


def drawn(layers: Sequence[int], shares: bool, most: int, random_: random.Random) -> Candidate:
    """Monte Carlo, as published: random layers, random rates, random similarity share."""
    count = random_.randint(1, min(most, len(layers)))
    chosen = sorted(random_.sample(list(layers), count))
    return Candidate(
        {layer: random_.expovariate(1.0) + 0.05 for layer in chosen}, random_.random() if shares else None
    )


def changed(parent: Candidate, layers: Sequence[int], random_: random.Random) -> Candidate:
    """A neighbour: other rates, now and then a layer more, less or beside, another similarity share."""
    weights = {layer: weight * math.exp(random_.gauss(0, 0.4)) for layer, weight in parent.weights.items()}
    free = [layer for layer in layers if layer not in weights]
    move = random_.random()
    if move < 0.25 and free:
        weights[random_.choice(free)] = sum(weights.values()) / len(weights)
    elif move < 0.45 and len(weights) > 1:
        del weights[random_.choice(sorted(weights))]
    elif move < 0.65 and free:
        moved = random_.choice(sorted(weights))
        weights[min(free, key=lambda layer: (abs(layer - moved), random_.random()))] = weights.pop(moved)
    share = parent.similarity_share
    if share is not None:
        share = min(1.0, max(0.0, share + random_.gauss(0, 0.15)))
    return Candidate(dict(sorted(weights.items())), share)


def crossed(one: Candidate, other: Candidate, random_: random.Random) -> Candidate:
    """Layers of both parents; what both have from one of them."""
    weights = {}
    for layer in sorted({*one.weights, *other.weights}):
        parents = [parent.weights[layer] for parent in (one, other) if layer in parent.weights]
        if len(parents) == 2 or random_.random() < 0.5:
            weights[layer] = random_.choice(parents)
    share = random_.choice([one.similarity_share, other.similarity_share])
    return Candidate(weights or dict(one.weights), share)


def like(counts: Counts, patches: int, similarity_share: float | None) -> Candidate:
    """The candidate whose counts these are, under the budget that they meet."""
    weights, now = {}, patches
    for layer, count in sorted(counts.items()):
        weights[layer] = max(math.log(now / count), 1e-3)
        now = count
    return Candidate(weights, similarity_share)
