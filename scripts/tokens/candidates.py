"""The rows of the comparison: every way to drop or merge tokens, at a given share of the model's MACs.

Everything is written out here, down to how many patches each layer hands on, so that a row stays what it is when a
default of genprune changes. The row `default` is whatever `gp.ZeroTPrune(keep=...)` does, `ToMe` what `gp.ToMe` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

import genprune as gp
from genprune.tokens.costs import TokenCosts
from genprune.tokens.hosts import host_of
from genprune.tokens.schedule import falling

KEEPS = (0.8, 0.65, 0.5)  # of the dense model's MACs
MAIN = 0.65  # where the figures are taken
# Zero-TPrune as published, as far as it is: see docs/tokens.md; the share of the similarity stage is not
WPR = {
    "score": "wpr",
    "start": "auto",
    "steps": (5, 5, 1),
    "heads": "rms",
    "head_filter": (0.01, 0.7),
    "similarity_share": 0.3,
    "split": "halves",
    "temperature": 1.0,
    "keys": "mean",
    "reduce": "drop",
    "placement": "after_block",
    "proportional": False,
}
VOTE = {**WPR, "score": "vote"}
BARE = {"similarity_share": 0.0, "head_filter": None}
ALIKE = {**VOTE, "similarity_share": 1.0}  # importance splits the patches, keys alone say which of them go
MERGED = {**ALIKE, "placement": "before_mlp", "reduce": "merge", "proportional": True}
TURNS = {**MERGED, "split": "alternate"}
# patches that DiffRate publishes for DeiT-S at 2.9 G, after each layer's merging (196 enter)
DIFFRATE_DEIT_S = (196, 193, 175, 155, 140, 132, 120, 106, 87, 63, 55, 2)


@dataclass(frozen=True)
class Candidate:
    """One row: a method, and where it stands in the tables.

    Attributes:
        name: in tables and figures.
        settings: of the method, but for `keep`.
        schedule: how the counts of patches are found for a share of the MACs. `thirds`: a constant rate after a
            quarter, half and three quarters of the depth, as the author's settings have it; `every second`: a
            constant rate in every second layer from the first on; `even`: there, a constant number; `published`:
            DiffRate's counts, whatever they cost; `own`: the method's default; `searched`: by `gp.search_tokens`.
        kind: class of the method.
        keeps: shares of the MACs that it is measured at.
        group: heading in the tables.
    """

    name: str
    settings: dict[str, Any]
    schedule: str = "thirds"
    kind: str = "ZeroTPrune"
    keeps: tuple[float, ...] = (MAIN,)
    group: str = "ablation"


@dataclass(frozen=True)
class Row:
    """A candidate at one share of one model's MACs: `method` is what `gp.prune_tokens` is given."""

    candidate: Candidate
    keep: float | None
    method: Any

    @property
    def label(self) -> str:
        return self.candidate.name + (f" @ {self.keep:g}" if self.keep else "")

    @property
    def key(self) -> dict[str, Any]:
        """What the row's numbers depend on."""
        candidate = self.candidate
        if candidate.schedule in ("own", "searched"):
            return self.method.to_json()
        counts = {str(layer): count for layer, count in self.method.keep.items()}
        return {"kind": candidate.kind, "settings": candidate.settings, "counts": counts}


CANDIDATES = (
    Candidate("default", {}, "own", keeps=KEEPS, group="methods"),
    Candidate("ToMe", {}, "own", kind="ToMe", keeps=KEEPS, group="methods"),
    Candidate(
        "ToMe, every second layer",
        {"placement": "before_mlp"},
        "even",
        kind="ToMe",
        keeps=KEEPS[1:],
        group="methods",
    ),
    Candidate("page rank, full", WPR, keeps=KEEPS, group="methods"),
    Candidate("one vote", VOTE, keeps=KEEPS[1:], group="methods"),
    Candidate("random 0", {**WPR, **BARE, "score": "random", "seed": 0}, keeps=KEEPS[1:], group="methods"),
    Candidate("class attention", {**WPR, **BARE, "score": "cls"}, keeps=KEEPS[1:], group="methods"),
    Candidate("landmark votes", {**WPR, "score": "landmark"}, keeps=KEEPS[1:], group="methods"),
    Candidate("random 1", {**WPR, **BARE, "score": "random", "seed": 1}, group="methods"),
    Candidate("random 2", {**WPR, **BARE, "score": "random", "seed": 2}, group="methods"),
    Candidate(
        "DiffRate's counts, class attention, merged",
        {**MERGED, **BARE, "score": "cls"},
        "published",
        group="methods",
    ),
    # stages of the method, added one by one, as in the paper's table
    Candidate("page rank alone", {**WPR, **BARE, "heads": "mean"}),
    Candidate("+ RMS over heads", {**WPR, **BARE}),
    Candidate("+ head filter", {**WPR, "similarity_share": 0.0}),
    Candidate("+ similarity (= page rank, full)", WPR),
    Candidate("page rank, uniform start", {**WPR, "start": "uniform"}),
    Candidate("page rank, 1 step", {**WPR, "steps": (1, 1, 1)}),
    Candidate("page rank, 30 steps", {**WPR, "steps": (30, 30, 30)}),
    Candidate("one vote, no similarity", {**VOTE, "similarity_share": 0.0}),
    Candidate("class attention, with similarity", {**WPR, "score": "cls"}),
    # how tokens go, and where: step by step from the one vote to what merges
    Candidate("one vote, similarity decides alone", ALIKE, group="reduction"),
    Candidate("+ before the MLP", {**ALIKE, "placement": "before_mlp"}, group="reduction"),
    Candidate("+ merged", {**MERGED, "proportional": False}, group="reduction"),
    Candidate("+ proportional attention", MERGED, group="reduction"),
    Candidate("+ in every second layer", MERGED, "every second", group="reduction"),
    Candidate("+ the same number in each", MERGED, "even", group="reduction"),
    Candidate("+ alternate split", TURNS, "even", group="reduction"),
    Candidate("the same, with mlerp", {**TURNS, "reduce": "mlerp"}, "even", group="reduction"),
    Candidate("the same, split by page rank", {**TURNS, "score": "wpr"}, "even", group="reduction"),
    Candidate("the same, split by class attention (= default)", {**TURNS, "score": "cls"}, "even", group="reduction"),
    Candidate("the same, dropped", {**TURNS, "reduce": "drop", "proportional": False}, "even", group="reduction"),
    Candidate("page rank, full, merged", {**WPR, "reduce": "merge", "proportional": True}, group="reduction"),
)
TUNING = (
    *(
        Candidate(f"dropped: {score}, share {share:g}", {**WPR, "score": score, "similarity_share": share})
        for score in ("wpr", "vote")
        for share in (0.0, 0.3, 0.75, 1.0)
    ),
    *(
        Candidate(f"merged: {score}, {split}", {**MERGED, "score": score, "split": split}, "even")
        for score in ("wpr", "vote", "cls")
        for split in ("halves", "alternate")
    ),
    Candidate("merged: vote, alternate, share 0.5", {**TURNS, "similarity_share": 0.5}, "even"),
    Candidate("ToMe", {}, "own", kind="ToMe"),
)
QUICK = ("default", "ToMe", "page rank, full", "one vote", "random 0")


class Planner:
    """Turns candidates into methods for one model.

    Args:
        model: timm model without hooks of a reduction.
    """

    def __init__(self, model: nn.Module):
        host = host_of(model)
        self.patches, self.depth, self.costs = host.patches, len(host.paths), TokenCosts(host)

    def row(self, candidate: Candidate, keep: float) -> Row:
        kind = getattr(gp, candidate.kind)
        if candidate.schedule == "own":
            return Row(candidate, keep, kind(keep=keep, **candidate.settings))
        counts = self.counts(candidate, keep)
        share = None if candidate.schedule == "published" else keep
        return Row(candidate, share, kind(keep=counts, **candidate.settings))

    def counts(self, candidate: Candidate, keep: float) -> dict[int, int]:
        """`{layer: patches that it hands on}`: the most that stays below that share of the MACs."""
        if candidate.schedule == "published":
            return diffrate_counts(self.patches, self.depth)
        layers = tuple(range(0, self.depth, 2))
        if candidate.schedule == "thirds":
            layers = tuple(max(0, round(self.depth * quarter / 4) - 1) for quarter in (1, 2, 3))
        rule = "count" if candidate.schedule == "even" else "rate"
        low, high = 0.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            counts = falling(self.patches, layers, middle, rule)
            cost = self.costs.macs(counts, candidate.settings["placement"])
            low, high = (middle, high) if cost <= keep * self.costs.dense else (low, middle)
        return falling(self.patches, layers, low, rule)

    def rows(self, candidates: tuple[Candidate, ...], keep: float) -> list[Row]:
        """Of those that are measured at this share; DiffRate's own counts go with the figures' share."""
        found = [candidate for candidate in candidates if keep in candidate.keeps]
        return [self.row(c, keep) for c in found if c.schedule != "published" or keep == MAIN]


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
