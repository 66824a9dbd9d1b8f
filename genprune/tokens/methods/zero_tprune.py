"""Zero-TPrune: tokens ranked by votes or PageRank over the attention graph, redundant ones found by their keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from genprune.errors import GenpruneError
from genprune.tokens import checks
from genprune.tokens.choice import Choice, LayerView
from genprune.tokens.long_sequences import BlockedGraph, class_graph, landmark_graph, random_scores
from genprune.tokens.matching import nearest_kept, unit_keys
from genprune.tokens.methods.base import TokenMethod
from genprune.tokens.pagerank import SPLITS, DenseGraph, Graph, best_patches, choose_tokens, steps_at, vote_weights

STEPS = (5, 5, 1)  # of WPR: first quarter, middle half, last quarter of the layers
SCORES = ("auto", "landmark", "vote", "wpr", "cls", "random")


@dataclass(frozen=True)
class ZeroTPrune(TokenMethod):
    """Token pruning by votes over the attention graph, without training.

    The default is what measured best (docs/tokens-compared.md): a cheap score puts the tokens in order, the most
    redundant of every two are merged, in every second layer. `ZeroTPrune.published()` has the paper's own settings.

    Args:
        score: how tokens are ranked. `landmark`: some tokens vote for all. `vote`: all do. `wpr`: PageRank, whose
            first step from a uniform start is a vote. `cls`: the class token's attention. `random`: by `seed`,
            without the similarity stage. `auto`: where the similarity stage decides alone (it only needs an order)
            and there is a class token `cls`, the cheapest; else `landmark`.
        start: `cls`: the class token votes with sqrt(N) times the weight. `uniform`. `auto`: `cls` for wpr and
            landmark where there is a class token, else uniform.
        steps: of wpr: a number, or one each for the first quarter, the middle half and the last quarter of the
            layers. None: 5, 5, 1. Many steps forget the start.
        heads: `rms` (the paper's EIR) or `mean`.
        head_filter: heads whose scores (mean 1) have a variance outside of these bounds do not count. None: all do.
        similarity_share: how much of what goes is removed by the similarity stage, in [0, 1].
        split: who may be redundant to whom in that stage, patches being sorted by importance. `alternate`: every
            second one to the others. `halves`: the less important half to the other (the paper's Sequential-U).
        fall: how counts fall from layer to layer for a budget: each of `layers` removes the same number (`count`), or
            the same share (`rate`). Without `layers`: every second layer, or three at the quarters of the depth.
        temperature: of the votes, > 0. The author's earlier class project used 0.5.
        keys: how keys of heads are compared: their `mean`, or the `concat` of them.
        landmarks: patches that vote for all, >= 1.
        dense_limit: tokens up to which the map of all votes is made in one piece.
        seed: of `random`, which is drawn for each place in a batch.

    Reference:
        Wang et al., arXiv 2305.17328. The split between the stages is not published: `similarity_share` is ours.
    """

    reduce: str = "auto"
    placement: str = "auto"
    proportional: bool = True
    score: str = "auto"
    start: str = "auto"
    steps: int | tuple[int, int, int] | None = None
    heads: str = "rms"
    head_filter: tuple[float, float] | None = (0.01, 0.7)
    similarity_share: float = 1.0
    split: str = "alternate"
    fall: str = "count"
    temperature: float = 1.0
    keys: str = "mean"
    landmarks: int = 64
    dense_limit: int = 600
    seed: int = 0

    name: ClassVar[str] = "zero_tprune"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is None:
            raise GenpruneError(
                "keep=None says nothing about how much stays; expected a share, or counts per layer. Pass keep=0.65."
            )
        checks.check_choice("score", self.score, SCORES)
        checks.check_choice("start", self.start, ("auto", "cls", "uniform"))
        checks.check_choice("heads", self.heads, ("rms", "mean"))
        checks.check_choice("keys", self.keys, ("mean", "concat"))
        checks.check_choice("split", self.split, SPLITS)
        checks.check_choice("fall", self.fall, ("count", "rate"))
        if self.steps is not None:
            checks.check_steps(self.steps)
            object.__setattr__(self, "steps", self.steps if isinstance(self.steps, int) else tuple(self.steps))
        if self.head_filter is not None:
            object.__setattr__(self, "head_filter", checks.checked_bounds(self.head_filter))
        checks.check_share("similarity_share", self.similarity_share, zero=True)
        checks.check_positive("temperature", self.temperature)
        checks.check_whole("landmarks", self.landmarks, 1)
        checks.check_whole("dense_limit", self.dense_limit, 0)
        checks.check_whole("seed", self.seed, 0)

    @classmethod
    def published(cls, **settings: Any) -> ZeroTPrune:
        """The paper's own: PageRank over I' -> S -> I, tokens dropped after three blocks. `settings` replace some."""
        paper = {
            "reduce": "drop",
            "placement": "after_block",
            "proportional": False,
            "score": "wpr",
            "similarity_share": 0.3,
            "split": "halves",
            "fall": "rate",
        }
        return cls(**{**paper, **settings})

    def score_of(self, class_token: bool) -> str:
        """The score on a model with or without a class token: `score`, with `auto` decided."""
        if self.score != "auto":
            return self.score
        return "cls" if class_token and self.similarity_share == 1 else "landmark"

    def _chosen(self, q: Tensor, k: Tensor, keep: int, view: LayerView) -> Choice:
        batch, _, tokens, _ = k.shape
        score = self.score_of(view.class_token)
        needed = self._wants_target(view) or (self.similarity_share > 0 and score != "random")
        metric = unit_keys(k[:, :, view.prefix :], self.keys) if needed else None
        if score == "random":
            return self._drawn(metric, k, keep, view)
        alive = torch.ones(batch, tokens, dtype=torch.bool, device=k.device)
        if view.valid is not None:
            alive = torch.cat([alive[:, : view.prefix], view.valid], dim=1)
        return choose_tokens(
            self._graph(score, q, k, view),
            metric,
            alive,
            keep,
            view.prefix,
            steps=steps_at(self.steps or STEPS, view.layer, view.depth) if score == "wpr" else 1,
            class_weighted=self._class_weighted(score, view),
            heads=self.heads,
            bounds=self.head_filter,
            similarity_share=self.similarity_share,
            split=self.split,
            everyone=view.valid is None,
            wants_target=self._wants_target(view),
        )

    def _graph(self, score: str, q: Tensor, k: Tensor, view: LayerView) -> Graph:
        bias = view.bias
        if view.valid is not None:  # nobody votes for padding; finite, so that a row of padding alone is no NaN
            shut = torch.zeros(view.valid.shape, device=k.device).masked_fill_(~view.valid, -1e30)
            shut = torch.nn.functional.pad(shut, (view.prefix, 0))[:, None, None]  # (B, 1, 1, N)
            bias = shut if bias is None else bias + shut
        common = (view.scale, bias, self.temperature)
        if score == "cls":
            if not view.class_token:
                raise GenpruneError(
                    "score='cls' ranks by the class token's attention, and this model has none; expected a model "
                    "with a class token. Pass score='vote' or 'auto'."
                )
            return class_graph(q, k, *common)
        if score == "landmark":
            return landmark_graph(q, k, self.landmarks, view.prefix, view.class_token, *common)
        if k.shape[2] > self.dense_limit:
            return BlockedGraph(q, k, *common)
        return DenseGraph(vote_weights(q, k, *common))

    def _class_weighted(self, score: str, view: LayerView) -> bool:
        if self.start == "cls" and not view.class_token:
            raise GenpruneError(
                "start='cls' gives weight to the class token, and this model has none; expected a model with a class "
                "token. Pass start='auto' or 'uniform'."
            )
        return view.class_token and (self.start == "cls" or (self.start == "auto" and score in ("wpr", "landmark")))

    def _drawn(self, metric: Tensor | None, k: Tensor, keep: int, view: LayerView) -> Choice:
        scores = random_scores(k.shape[0], k.shape[2] - view.prefix, self.seed, view.layer, k.device)
        padding = None if view.valid is None else ~view.valid
        if padding is not None:
            scores = scores.masked_fill(padding, -torch.inf)
        kept = best_patches(scores, keep)
        return Choice(kept, nearest_kept(metric, kept, padding) if self._wants_target(view) else None)
