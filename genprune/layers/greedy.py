"""One layer at a time, the others scored again after each: for losses that do not add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from genprune.layers.candidates import Candidate, conflicts, families_of_children
from genprune.layers.output_loss import OutputLoss


@dataclass(frozen=True)
class Removal:
    """One step of a greedy order: the layer that went, and the distance to the dense output afterwards."""

    name: str
    loss: float


def inside(inner: Candidate, outer: Candidate) -> bool:
    """Whether everything that `inner` changes lies in what `outer` changes."""
    return all(any(f"{a}.".startswith(f"{b}.") for b in outer.paths) for a in inner.paths)


def greedy_order(
    loss: OutputLoss,
    candidates: Sequence[Candidate],
    enough: Callable[[Sequence[Candidate]], bool],
    allowed: Callable[[Sequence[Candidate]], bool] = lambda taken: True,
) -> list[Removal]:
    """Remove the layer that changes the output least, score the others again, and so on.

    A block whose branches went before may still go as a whole; a layer that would leave an empty block does not go.

    Args:
        loss: the distance to the dense output, with everything removed so far.
        candidates: removals of layers.
        enough: told the layers removed so far (nested ones left out); stops the walk.
        allowed: told the layers that would be removed; constraints such as `max_consecutive`.

    Reference:
        FinerCut (arXiv 2405.18218).
    """
    order: list[Removal] = []
    taken: list[Candidate] = []
    left = list(candidates)
    children = families_of_children(candidates, loss.sites)
    names = [candidate.name for candidate in candidates]
    while left and not enough(taken):
        gone = {names.index(candidate.name) for candidate in taken}
        possible = []
        for candidate in left:
            after = gone | {names.index(candidate.name)}
            if any(inside(candidate, other) for other in taken) or any(after.issuperset(group) for group in children):
                continue
            if allowed(merged(taken, candidate)):
                possible.append(candidate)
        if not possible:
            break
        losses: dict[str, float] = {}
        for candidate in possible:  # a block in place of its own branches: scored by itself
            replaced = [other for other in taken if conflicts(candidate, other)]
            if replaced:
                losses[candidate.name] = loss.joint(merged(taken, candidate))
        plain = [candidate for candidate in possible if candidate.name not in losses]
        losses |= loss.alone(plain, taken, what=f"layer {len(order) + 1}") if plain else {}
        best = min(possible, key=lambda candidate: losses[candidate.name])
        taken = merged(taken, best)
        left.remove(best)
        order.append(Removal(best.name, losses[best.name]))
    return order


def merged(taken: Sequence[Candidate], candidate: Candidate) -> list[Candidate]:
    """The layers removed so far with one more, those that lie inside of it left out."""
    return [*(other for other in taken if not inside(other, candidate)), candidate]
