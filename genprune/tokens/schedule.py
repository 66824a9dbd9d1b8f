"""How many patches each layer hands on: written out, or found for a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from genprune.errors import BudgetUnreachable, GenpruneError, NoMatchingSites
from genprune.tokens.hosts import TokenHost
from genprune.tokens.methods import TokenMethod
from genprune.tokens.state import Kept

Counts = dict[int, int]  # layer -> patches that it hands on


def check_counts(counts: Mapping[int, int], host: TokenHost) -> Counts:
    """The counts in order of layers, checked against the host.

    Raises:
        NoMatchingSites: a layer does not exist, or its queries and keys cannot be read.
        BudgetUnreachable: no layer removes anything, or a count is above the one before it.
    """
    before, checked = host.patches, {}
    for layer, count in sorted(counts.items()):
        _check_layer(layer, host)
        if not 1 <= count <= before:
            raise GenpruneError(
                f"layer {layer} is to hand on {count} patches; expected 1 to {before}, what reaches it. Counts fall "
                "from layer to layer."
            )
        checked[layer] = before = count
    return checked


def _check_layer(layer: int, host: TokenHost) -> None:
    depth = len(host.paths)
    if not isinstance(layer, int) or not 0 <= layer < depth:
        raise NoMatchingSites(
            f"there is no layer {layer!r}: this {type(host.model).__name__} has {depth}, numbered 0 to {depth - 1}. "
            "Tokens are reduced after (or inside) the layer of that number."
        )
    if layer not in host.scored:
        raise NoMatchingSites(
            f"queries and keys of layer {layer} cannot be read in this {type(host.model).__name__}; expected one of "
            f"{list(host.scored)}."
        )


def default_layers(host: TokenHost, method: TokenMethod) -> tuple[int, ...]:
    """Where tokens are reduced when nothing is said: after a quarter, half and three quarters of the depth.

    For 12 layers 2, 5 and 8 (counted from 0), as the author's published settings have it. A method that removes a
    constant number in each layer takes all of them.
    """
    if method.layers is not None:
        for layer in method.layers:
            _check_layer(layer, host)
        return tuple(sorted(method.layers))
    depth = len(host.paths)
    if method.fall == "count":
        return host.scored
    wanted = [max(0, round(depth * quarter / 4) - 1) for quarter in (1, 2, 3)]
    return tuple(sorted({min(host.scored, key=lambda layer: (abs(layer - place), layer)) for place in wanted}))


def falling(patches: int, layers: Sequence[int], share: float, fall: str) -> Counts:
    """Counts that fall by one rule, which `share` in (0, 1] turns from nothing left to everything kept.

    `rate`: each layer keeps `int(n * share)`. `count`: each removes the same number, `patches * (1 - share)` over all
    layers together, at most half of what it is given.
    """
    counts, now = {}, patches
    for position, layer in enumerate(layers):
        if fall == "rate":
            now = max(1, int(now * share))
        else:
            now = max(patches - round(patches * (1 - share) * (position + 1) / len(layers)), now - now // 2, 1)
        counts[layer] = now
    return counts


def solve(
    keep: float, cost: Callable[[Counts], float], host: TokenHost, method: TokenMethod, what: str = "MACs"
) -> Counts:
    """The counts whose cost is nearest to `keep` of the dense model's from below, by bisection.

    Args:
        keep: share of the dense cost, in (0, 1].
        cost: counts to cost, rising with every count; `cost({})` is the dense one.
        host, method: give patches, layers and the rule by which counts fall.
        what: the cost's name in messages.

    Raises:
        BudgetUnreachable: the cost of one patch in every later layer is above the budget.
    """
    layers = default_layers(host, method)
    dense = cost({})
    budget = keep * dense
    if keep >= 1:
        return {layer: host.patches for layer in layers}
    low, high = 0.0, 1.0
    least = falling(host.patches, layers, low, method.fall)
    if cost(least) > budget:
        raise BudgetUnreachable(
            f"keep={keep} of {what} is below what reducing tokens after layers {list(layers)} can reach: one patch "
            f"left still costs {cost(least) / dense:.3f}. Raise keep, or give earlier layers=(...)."
        )
    for _ in range(30):
        middle = (low + high) / 2
        if cost(falling(host.patches, layers, middle, method.fall)) <= budget:
            low = middle
        else:
            high = middle
    counts = falling(host.patches, layers, low, method.fall)
    return _filled(counts, cost, budget, host.patches)


def _filled(counts: Counts, cost: Callable[[Counts], float], budget: float, patches: int) -> Counts:
    """What rounding left over goes to the last layers: counts rise by one while the budget allows it."""
    for layer in reversed(sorted(counts)):
        while True:
            earlier = [counts[other] for other in counts if other < layer]
            raised = {**counts, layer: counts[layer] + 1}
            if raised[layer] > min(earlier, default=patches) or cost(raised) > budget:
                break
            counts = raised
    return counts


def explicit(keep: Mapping[int, float | int], host: TokenHost) -> Counts:
    """Counts of a mapping of layers to counts, or to shares of what reaches them (`int(n * share)`)."""
    counts, now = {}, host.patches
    for layer, value in sorted(keep.items()):
        _check_layer(layer, host)
        now = max(1, int(now * value)) if isinstance(value, float) else value
        counts[layer] = now
    return check_counts(counts, host)


def per_layer(counts: Mapping[int, int], host: TokenHost) -> tuple[Kept, ...]:
    """One entry for each layer: `(after, before)`, or None where nothing goes."""
    schedule, now = [], host.patches
    for layer in range(len(host.paths)):
        after = counts.get(layer, now)
        schedule.append((after, now) if after < now else None)
        now = after
    return tuple(schedule)
