"""The rows of the comparison: every way to drop or merge tokens, at a given share of the model's MACs.

Settings that the paper fixes are written out here, so that a row stays what it is when a default of genprune changes;
the row `default` is whatever `gp.ZeroTPrune(keep=...)` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import genprune as gp

KEEPS = (0.8, 0.65, 0.5)  # of the dense model's MACs
MAIN = 0.65  # where the figures are taken
STEPS = (5, 5, 1)  # page rank's, in the first quarter of the layers, the middle half, the last quarter
FILTER = (0.01, 0.7)
SHARE = 0.3  # of the removed tokens that the similarity stage takes
WPR = {"score": "wpr", "steps": STEPS, "heads": "rms", "head_filter": FILTER, "similarity_share": SHARE}
BARE = {"similarity_share": 0.0, "head_filter": None}
# patches that DiffRate publishes for DeiT-S at 2.9 G, after each layer's merging (196 enter)
DIFFRATE_DEIT_S = (196, 193, 175, 155, 140, 132, 120, 106, 87, 63, 55, 2)


@dataclass(frozen=True)
class Candidate:
    """One row: a method, and where it stands in the tables.

    Attributes:
        name: in tables and figures.
        settings: of the method, but for `keep`.
        kind: `ZeroTPrune` or `ToMe`.
        keeps: shares of the MACs that it is measured at; empty: it has keep counts of its own.
        group: heading in the tables.
    """

    name: str
    settings: dict[str, Any]
    kind: str = "ZeroTPrune"
    keeps: tuple[float, ...] = KEEPS[1:]
    group: str = "ablation"

    def method(self, keep: float | dict[int, int]) -> gp.ZeroTPrune | gp.ToMe:
        return getattr(gp, self.kind)(keep=keep, **self.settings)


CANDIDATES = (
    Candidate("default", {}, keeps=KEEPS, group="methods"),
    Candidate("page rank, full", WPR, keeps=KEEPS, group="methods"),
    Candidate("one vote", {**WPR, "score": "vote"}, keeps=KEEPS, group="methods"),
    Candidate("class attention", {**WPR, **BARE, "score": "cls"}, keeps=KEEPS, group="methods"),
    Candidate("landmark votes", {**WPR, "score": "landmark"}, keeps=KEEPS, group="methods"),
    *(
        Candidate(f"random {seed}", {**WPR, **BARE, "score": "random", "seed": seed}, keeps=KEEPS, group="methods")
        for seed in range(3)
    ),
    Candidate("ToMe", {}, kind="ToMe", keeps=KEEPS, group="methods"),
    # stages of the method, added one by one, as in the paper's table
    Candidate("page rank alone", {**WPR, **BARE, "heads": "mean"}),
    Candidate("+ RMS over heads", {**WPR, **BARE}),
    Candidate("+ head filter (page rank, no similarity)", {**WPR, "similarity_share": 0.0}),
    Candidate("page rank, uniform start", {**WPR, "start": "uniform"}),
    Candidate("page rank, 1 step", {**WPR, "steps": (1, 1, 1)}),
    Candidate("page rank, 30 steps", {**WPR, "steps": (30, 30, 30)}),
    Candidate("one vote, no similarity", {**WPR, "score": "vote", "similarity_share": 0.0}),
    Candidate("class attention, with similarity", {**WPR, "score": "cls"}),
    # how tokens go, and where
    Candidate("one vote, before the MLP", {**WPR, "score": "vote", "placement": "before_mlp"}, group="reduction"),
    Candidate("one vote, merged", {**WPR, "score": "vote", "reduce": "merge"}, group="reduction"),
    Candidate("one vote, mlerp", {**WPR, "score": "vote", "reduce": "mlerp"}, group="reduction"),
    Candidate("page rank, before the MLP", {**WPR, "placement": "before_mlp"}, group="reduction"),
    Candidate("page rank, merged", {**WPR, "reduce": "merge"}, group="reduction"),
)
DIFFRATE = Candidate(
    "DiffRate's counts, class attention, merged",
    {"score": "cls", "similarity_share": 0.0, "reduce": "merge", "placement": "before_mlp"},
    keeps=(),
    group="methods",
)
QUICK = ("default", "page rank, full", "one vote", "random 0", "ToMe")


def diffrate_counts(patches: int, depth: int) -> dict[int, int]:
    """DiffRate's published counts for DeiT-S, for a model with other patches or another depth: `{layer: count}`.

    It is the published *schedule* only; DiffRate learns it for its own scores and its own mix of pruning and merging.
    """
    counts, last = {}, patches
    for layer in range(depth):
        published = DIFFRATE_DEIT_S[(layer + 1) * len(DIFFRATE_DEIT_S) // depth - 1]
        count = max(1, round(published * patches / DIFFRATE_DEIT_S[0]))
        if count < last:
            counts[layer] = last = count
    return counts


def tuning_grid() -> tuple[Candidate, ...]:
    """What the defaults are chosen from, on dev pictures: the score, and the share of the similarity stage."""
    return tuple(
        Candidate(f"{score}, share {share:g}", {**WPR, "score": score, "similarity_share": share}, group="tuning")
        for score in ("wpr", "vote")
        for share in (0.0, 0.15, 0.3, 0.5, 0.75, 1.0)
    )
