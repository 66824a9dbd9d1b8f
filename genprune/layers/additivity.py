"""Do single losses add up? Random sets of layers: the sum of what each loses alone against what they lose together."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from genprune.denoising.activations import shown
from genprune.layers.candidates import Candidate, conflicts, families_of_children
from genprune.layers.output_loss import OutputLoss


@dataclass(frozen=True)
class Additivity:
    """Predicted and true losses of random sets of layers.

    Attributes:
        predicted: sum of the single losses of each set.
        true: loss of each set removed together.
        sizes: layers in each set.
    """

    predicted: tuple[float, ...]
    true: tuple[float, ...]
    sizes: tuple[int, ...]

    @property
    def pearson(self) -> float:
        """Linear correlation; NaN where either side is constant."""
        return _correlation(self.predicted, self.true)

    @property
    def spearman(self) -> float:
        """Correlation of ranks: whether the sum puts sets in the right order."""
        return _correlation(_ranks(self.predicted), _ranks(self.true))

    def to_json(self) -> dict[str, Any]:
        # lists, as JSON reads them back: a plan equals itself on disk
        measured = {name: list(values) for name, values in asdict(self).items()}
        found = {"pearson": self.pearson, "spearman": self.spearman}
        return measured | {name: None if math.isnan(value) else value for name, value in found.items()}

    def __str__(self) -> str:
        return (
            f"additivity over {len(self.true)} random sets of {min(self.sizes)} to {max(self.sizes)} layers: "
            f"Pearson {self.pearson:.3f}, Spearman {self.spearman:.3f} between summed and joint loss"
        )


def additivity(
    loss: OutputLoss,
    candidates: Sequence[Candidate],
    losses: Mapping[str, float],
    *,
    sets: int,
    saving: tuple[str, float, float],
    seed: int,
    progress: bool = False,
) -> Additivity:
    """Measure it on random sets that a plan could hold.

    Args:
        loss: how losses are measured.
        candidates: removable layers.
        losses: of each alone.
        sets: how many, >= 2.
        saving: quantity, and the least and the largest amount of it that a set saves, spread evenly.
        seed: of the draw.
        progress: show a bar.

    Reference:
        LAPTOP-Diff (arXiv 2404.11098) chooses the output loss for its additivity.
    """
    draw = random.Random(seed)
    quantity, low, high = saving
    children = families_of_children(candidates, loss.sites)
    predicted, true, sizes = [], [], []
    for index in shown(range(sets), "additivity", progress, unit="set"):
        target = low + (high - low) * index / max(sets - 1, 1)
        chosen = _random_set(candidates, children, quantity, target, draw)
        predicted.append(sum(losses[candidates[i].name] for i in chosen))
        true.append(loss.joint([candidates[i] for i in chosen]))
        sizes.append(len(chosen))
    return Additivity(tuple(predicted), tuple(true), tuple(sizes))


def _random_set(
    candidates: Sequence[Candidate],
    children: Sequence[tuple[int, ...]],
    quantity: str,
    target: float,
    draw: random.Random,
) -> list[int]:
    """Layers in random order until they save enough, without nesting and without emptying a block; at least two."""
    order = list(range(len(candidates)))
    draw.shuffle(order)
    chosen: list[int] = []
    saved = 0.0
    for index in order:
        if saved >= target and len(chosen) >= 2:
            break
        after = {*chosen, index}
        if any(conflicts(candidates[index], candidates[other]) for other in chosen):
            continue
        if any(after.issuperset(group) for group in children):
            continue
        chosen.append(index)
        saved += candidates[index].saves[quantity]
    return chosen


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0, ties sharing their mean."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for position in range(start, stop):
            ranks[order[position]] = (start + stop - 1) / 2
        start = stop
    return ranks


def _correlation(first: Sequence[float], second: Sequence[float]) -> float:
    import numpy as np

    if len(first) < 2 or not np.std(first) or not np.std(second):
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])
