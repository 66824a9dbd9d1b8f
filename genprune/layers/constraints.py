"""What sets of layers may go together: nesting, emptied blocks, runs of consecutive blocks, n of m groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from genprune.allocation.knapsack import Limit
from genprune.errors import NoMatchingSites
from genprune.layers.candidates import Candidate, exclusions, families_of_children, nested, sequences
from genprune.sites import Sites

NESTED = "one change of a layer at a time"
EMPTIED = "an emptied block goes as a whole"


def limits(
    candidates: Sequence[Candidate],
    sites: Sites,
    max_consecutive: int | None = None,
    n_of_m: tuple[int, int] | None = None,
) -> tuple[Limit, ...]:
    """The rules that a choice among these candidates has to keep.

    Args:
        candidates: in any order; indices of the limits are theirs.
        sites: of the model.
        max_consecutive: at most this many neighbours of one list go (blocks, or one branch of them).
        n_of_m: `(n, m)`: of every m consecutive blocks of a list exactly n stay; of a shorter rest their share,
            rounded either way.

    Raises:
        NoMatchingSites: groups were asked for and no list of blocks is among the candidates.
    """
    found = [Limit(members, 0, 1, NESTED) for members in exclusions(candidates)]
    found += [Limit(group, 0, len(group) - 1, EMPTIED) for group in families_of_children(candidates, sites)]
    if max_consecutive is not None:
        for by_number in sequences(candidates).values():
            for start in by_number:
                run = [by_number[n] for n in range(start, start + max_consecutive + 1) if n in by_number]
                if len(run) == max_consecutive + 1:
                    found.append(Limit(tuple(run), 0, max_consecutive, f"max_consecutive={max_consecutive}"))
    if n_of_m is not None:
        groups = _groups(candidates, *n_of_m)
        if not groups:
            raise NoMatchingSites(
                f"n_of_m={n_of_m} groups blocks of a list, and none of kind 'block' may go; expected some. Add "
                "'block' to kinds, or leave n_of_m out."
            )
        found += groups
    return tuple(found)


def _groups(candidates: Sequence[Candidate], n: int, m: int) -> list[Limit]:
    found = []
    for pattern, by_number in sequences(candidates).items():
        if not pattern.endswith(":block"):
            continue
        numbers = sorted(by_number)
        for start in range(0, len(numbers), m):
            group = tuple(by_number[number] for number in numbers[start : start + m])
            gone = (m - n) * len(group)
            low, high = gone // m, -(-gone // m)  # both the same for a whole group
            found.append(Limit(group, low, high, f"n_of_m=({n}, {m})"))
    return found


def eligible(
    candidates: Iterable[Candidate], sites: Sites, offered: Callable[[Candidate], bool], protect: Sequence[str]
) -> list[Candidate]:
    """The candidates that may go: offered, and neither around nor inside anything protected.

    Args:
        sites: of the model.
        offered: whether a method may take a candidate.
        protect: shell-style patterns of names of sites or of candidates.

    Raises:
        NoMatchingSites: a pattern fits nothing, or nothing is left.
    """
    candidates = list(candidates)
    paths: set[str] = set()
    for pattern in protect:
        fitting = [c for c in candidates if fnmatchcase(c.name, pattern)]
        paths |= {path for candidate in fitting for path in candidate.paths}
        if not fitting:
            paths |= {sites[name].path for name in sites.match(pattern)}
    left = [
        candidate
        for candidate in candidates
        if offered(candidate) and not any(nested(own, path) for own in candidate.paths for path in paths)
    ]
    if not left:
        raise NoMatchingSites(
            f"protect={list(protect)} and the kinds asked for leave none of the {len(candidates)} changes of layers "
            f"in {sites.host}; expected some. Narrow the patterns, or allow more kinds."
        )
    return left


def allowed(taken: Sequence[Candidate], rules: Sequence[Limit], names: Sequence[str]) -> bool:
    """Whether a set of candidates keeps the upper bounds of these limits (a set that grows meets lower ones later)."""
    indices = {names.index(candidate.name) for candidate in taken}
    return all(sum(member in indices for member in rule.members) <= rule.high for rule in rules)
