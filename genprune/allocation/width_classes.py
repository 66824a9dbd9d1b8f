"""Width classes: blocks that share their widths, so that compiled or regional kernels are few."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from genprune.costs import SiteCosts
from genprune.sites import Sites


def width_classes(sites: Sites, scores: Mapping[str, Tensor], costs: SiteCosts, most: int | None) -> list[list[str]]:
    """Group the sites that must have one width.

    Blocks of one shape are sorted by mean score and split into runs of nearly equal length; the sites of a run that
    play the same role share one width. The runs depend on scores only, never on a budget, so that plans stay nested.

    Args:
        sites: the eligible ones.
        scores: site name -> shape `(size,)`.
        costs: of the whole model; tells blocks of different dense shapes apart.
        most: combinations of widths that the blocks of one kind of structure may have, all dense shapes together;
            each dense shape has at least one. None: every site for itself.

    Returns:
        Lists of site names, in site order of their first member.
    """
    if most is None:
        return [[name] for name in sites]
    blocks: dict[str, list[str]] = {}
    for name, site in sites.items():
        if site.size > 1:
            blocks.setdefault(_block_path(costs.sites, name), []).append(name)
    shapes: dict[tuple, dict[tuple, list[str]]] = {}  # structure -> dense shape -> block paths
    for path, names in blocks.items():
        structure = tuple(name.removeprefix(path) for name in names)
        shape = tuple((sites[name].size, costs.unit(name).params) for name in names)
        shapes.setdefault(structure, {}).setdefault(shape, []).append(path)
    joined: dict[str, list[str]] = {}
    for by_shape in shapes.values():
        for paths, runs in zip(by_shape.values(), _shares(list(map(len, by_shape.values())), most)):
            ranked = sorted(paths, key=lambda path: _mean_score(blocks[path], scores))
            for run in _split(ranked, runs):
                for together in zip(*(blocks[path] for path in run)):
                    joined |= dict.fromkeys(together, list(together))
    order = {name: index for index, name in enumerate(sites)}
    unique = dict.fromkeys(tuple(sorted(joined.get(name, [name]), key=order.__getitem__)) for name in sites)
    return [list(group) for group in unique]


def _block_path(sites: Sites, name: str) -> str:
    """Path of the block that holds a site: its outermost ancestor below wrappers, or the site's own path."""
    above = [sites[parent] for parent in sites.ancestors(name)]
    return next((site.path for site in reversed(above) if site.kind != "wrapper"), sites[name].path)


def _mean_score(names: list[str], scores: Mapping[str, Tensor]) -> float:
    return sum(float(scores[name].double().mean()) for name in names) / len(names)


def _shares(counts: list[int], most: int) -> list[int]:
    """Split `most` runs over shapes that have `counts` blocks: one each, the rest to the longest runs."""
    runs = [1] * len(counts)
    while sum(runs) < most and any(run < count for run, count in zip(runs, counts)):
        longest = max(range(len(counts)), key=lambda i: (counts[i] / runs[i] if runs[i] < counts[i] else 0, -i))
        runs[longest] += 1
    return runs


def _split(items: list[str], runs: int) -> list[list[str]]:
    bounds = [round(i * len(items) / runs) for i in range(runs + 1)]
    return [items[start:stop] for start, stop in zip(bounds, bounds[1:])]
