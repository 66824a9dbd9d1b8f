"""How many patches each layer hands on: written out, or found for a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from genprune.errors import BudgetUnreachable, GenpruneError, NoMatchingSites
from genprune.tokens.hosts import TokenHost
from genprune.tokens.methods import TokenMethod, ToMe
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


def fewest(method: TokenMethod, patches: int) -> int:
    """How many of `patches` a layer hands on at least: a method that merges pairs removes up to half of them."""
    return patches - patches // 2 if method.name == ToMe.name else 1


def default_layers(host: TokenHost, method: TokenMethod) -> tuple[int, ...]:
    """Where tokens are reduced when nothing is said: after a quarter, half and three quarters of the depth.

    For 12 layers 2, 5 and 8 (counted from 0), as the author's published settings have it. A method whose counts fall
    by a constant number takes every layer, or every second one, from the first on.
    """
    if method.layers is not None:
        for layer in method.layers:
            _check_layer(layer, host)
        return tuple(sorted(method.layers))
    depth = len(host.paths)
    if method.fall == "count":
        return host.scored[:: method.spacing]
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
    keep: float, share: Callable[[Counts], float], host: TokenHost, method: TokenMethod, what: str = "MACs"
) -> Counts:
    """The counts whose cost comes nearest to a budget, by bisection over one rule for all layers.

    Args:
        keep: share of the dense cost, in (0, 1].
        share: counts to their share of the dense cost, rising with every count.
        host, method: give patches, layers and the rule by which counts fall.
        what: the cost's name in messages.

    Raises:
        BudgetUnreachable: the cost of one patch in every later layer is above the budget.
    """
    layers = default_layers(host, method)
    if keep >= 1:
        return {layer: host.patches for layer in layers}
    return fitted(keep, share, host.patches, lambda part: falling(host.patches, layers, part, method.fall), what)


def fitted(
    keep: float, share: Callable[[Counts], float], patches: int, rule: Callable[[float], Counts], what: str
) -> Counts:
    """`solve` for any rule that turns a number in [0, 1] into counts, which rise with it up to `patches`.

    The budget is not exceeded, but where that would miss it by more than 0.5 % of the dense cost and half a patch's
    step above is nearer.
    """
    least = rule(0.0)
    if share(least) > keep:
        raise BudgetUnreachable(
            f"keep={keep} of {what} is below what reducing tokens after layers {sorted(least)} can reach: with "
            f"{min(least.values())} of {patches} patches left it is {share(least):.3f}. Raise keep above that, or "
            "give earlier layers=(...); at 1 or more there is nothing to gain here."
        )
    low, high, counts = 0.0, 1.0, least
    for _ in range(30):
        middle = (low + high) / 2
        tried = rule(middle)
        if share(tried) <= keep:
            low, counts = middle, tried
        else:
            high = middle
    return _filled(counts, share, keep, patches)


TOLERANCE = 0.005  # of the dense cost: below a budget by that much is near enough


def _filled(counts: Counts, share: Callable[[Counts], float], keep: float, patches: int) -> Counts:
    """What rounding left over goes to the last layers: counts rise by one while that brings the budget nearer."""
    reached = share(counts)
    for layer in sorted(counts, reverse=True):
        earlier = min((counts[other] for other in counts if other < layer), default=patches)
        while counts[layer] < earlier:
            raised = {**counts, layer: counts[layer] + 1}
            if (after := share(raised)) > keep:
                break
            counts, reached = raised, after
    if keep - reached <= TOLERANCE:
        return counts
    above = [{**counts, layer: counts[layer] + 1} for layer in counts]
    above = [one for one in above if _falls(one, patches)]
    nearest = min(above, key=share, default=counts)
    return nearest if share(nearest) - keep < keep - reached else counts


def _falls(counts: Counts, patches: int) -> bool:
    values = [patches, *(counts[layer] for layer in sorted(counts))]
    return all(after <= before for before, after in zip(values, values[1:]))


def check_acts(method: TokenMethod, counts: Counts, host: TokenHost) -> None:
    """Refuse counts that save nothing, unless that was asked for: `keep=1`, counts of all patches, `r=0`.

    Raises:
        GenpruneError: more goes in a layer than the method can remove there; or less than everything was asked for,
            and no patch goes, or only where no layer is after it.
    """
    acting = [layer for layer, kept in enumerate(per_layer(counts, host)) if kept is not None]
    given = method.keep.values() if isinstance(method.keep, Mapping) else [method.keep]
    if not acting and any(isinstance(value, float) and value < 1 for value in given):
        raise GenpruneError(
            f"keep={method.keep} removes none of the {host.patches} patches of this {type(host.model).__name__}; "
            "expected to save something. Lower keep; keep=1.0 says that all are meant to stay."
        )
    for layer in acting:
        after, before = per_layer(counts, host)[layer]
        if after < fewest(method, before):
            raise GenpruneError(
                f"layer {layer} is to hand on {after} of {before} patches, and {type(method).__name__} merges pairs, "
                f"so that {fewest(method, before)} stay at least. Spread it over more layers, or use another method."
            )
    last = len(host.paths) - 1
    if acting == [last] and method.placement == "after_block":
        raise GenpruneError(
            f"tokens would be removed after layer {last} alone, the last one, which saves nothing; expected an "
            "earlier layer. Name one, or use placement='before_mlp'."
        )


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
    if hasattr(host, "schedule"):  # levels, each of a size of its own
        return host.schedule(counts)
    schedule, now = [], host.patches
    for layer in range(len(host.paths)):
        after = counts.get(layer, now)
        schedule.append((after, now) if after < now else None)
        now = after
    return tuple(schedule)
