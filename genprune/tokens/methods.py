"""The methods of token reduction as configs: `ZeroTPrune`, and `ToMe` as the merge baseline."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from genprune.errors import GenpruneError, PlanMismatch, nearest
from genprune.files import whole_file
from genprune.tokens import checks
from genprune.tokens.choice import Choice, LayerView, check_count
from genprune.tokens.long_sequences import BlockedGraph, class_graph, landmark_graph, random_scores
from genprune.tokens.matching import nearest_kept, tome_matching, unit_keys
from genprune.tokens.pagerank import SPLITS, DenseGraph, Graph, best_patches, choose_tokens, steps_at, vote_weights
from genprune.tokens.reducing import REDUCTIONS, RESTORES

FORMAT_VERSION = 1
STEPS = (5, 5, 1)  # of WPR: first quarter, middle half, last quarter of the layers
SCORES = ("auto", "landmark", "vote", "wpr", "cls", "random")


@dataclass(frozen=True)
class TokenMethod:
    """What every method of token reduction has: how much stays, where, and what becomes of the rest. Use a subclass.

    Args:
        keep: a share of the model's cost, in (0, 1]; or `{layer: share of its patches in (0, 1] (float: the count is
            int(n * share)) or count >= 1 (int)}`.
        of: what one share is a share of, `macs` or `latency`.
        layers: where to reduce when `keep` is one share, 0-based. None: the host's default.
        reduce: `drop`, `merge` (into the most similar kept token) or `mlerp` (the same, keeping norms); `auto`: merge
            where the host can weigh merged tokens, else drop.
        placement: `after_block`, or `before_mlp` of the same block (cheaper per removed token); `auto`: before_mlp
            where the host's blocks run attention and MLP one after the other.
        proportional: after merges, add log(size) to the attention logits. No effect where tokens are dropped.
        restore: how a removed token comes back where a full grid is needed: a copy of the `nearest` kept token, its
            `own` value when it was removed, or `zeros`.
    """

    keep: float | Mapping[int, float | int] | None = 0.65
    of: str = "macs"
    layers: tuple[int, ...] | None = None
    reduce: str = "drop"
    placement: str = "after_block"
    proportional: bool = False
    restore: str = "own"

    name: ClassVar[str] = ""
    fall: ClassVar[str] = "rate"  # how counts fall for a budget: by one rate, or by one `count` per layer
    spacing: ClassVar[int] = 2  # which layers reduce when counts fall by count and none are named: every so many

    def __post_init__(self) -> None:
        if isinstance(self.keep, Mapping):
            object.__setattr__(self, "keep", checks.checked_layers(self.keep))
        elif self.keep is not None:
            checks.check_share("keep", self.keep, zero=False)
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
            for layer in self.layers:
                checks.check_whole("layers", layer, 0)
        checks.check_choice("of", self.of, ("macs", "latency"))
        checks.check_choice("reduce", self.reduce, ("auto", *REDUCTIONS))
        checks.check_choice("placement", self.placement, ("auto", "after_block", "before_mlp"))
        checks.check_choice("restore", self.restore, RESTORES)

    def choose(self, q: Tensor, k: Tensor, keep: int, view: LayerView) -> Choice:
        """Which patches stay after a layer. Deterministic, without gradients, in float32 or wider.

        Args:
            q, k: queries and keys of the layer after norms and rotary embedding, shape `(B, H, N, d)`, of which the
                first `view.prefix` tokens are the prefix, and n = N - prefix are patches.
            keep: patches that stay, 1 to n.
            view: what the layer is.

        Returns:
            Indices of shape `(B, keep)`; targets where they are merged into something or `view` asks for them.

        Raises:
            GenpruneError: `keep` is out of range, or the method needs a class token that there is not.
        """
        patches = k.shape[2] - view.prefix
        check_count(keep, patches)
        if keep == patches:
            kept = torch.arange(patches, device=k.device).expand(k.shape[0], patches)
            return Choice(kept, kept if self._wants_target(view) else None)
        with torch.no_grad(), _full_precision(k.device.type):
            return self._chosen(q, k, keep, view)

    def _chosen(self, q: Tensor, k: Tensor, keep: int, view: LayerView) -> Choice:
        raise NotImplementedError

    def _wants_target(self, view: LayerView) -> bool:
        return view.wants_target or self.reduce != "drop"

    def settled(self, merges: bool, before_mlp: bool) -> TokenMethod:
        """The method with `auto` decided for a host that can merge, and reduce before the MLP, or cannot."""
        reduce = ("merge" if merges else "drop") if self.reduce == "auto" else self.reduce
        placement = ("before_mlp" if before_mlp else "after_block") if self.placement == "auto" else self.placement
        return dataclasses.replace(self, reduce=reduce, placement=placement)

    def changed(self, **changes: Any) -> TokenMethod:
        """A copy with other values. Raises `GenpruneError` for an unknown name or a value out of range."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise GenpruneError(
                    f"{type(self).__name__} has no '{name}'{nearest(name, known)}; expected {', '.join(known)}."
                )
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; `TokenMethod.from_json` reads it."""
        values = {field.name: checks.as_json(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"format_version": FORMAT_VERSION, "method": self.name, **values}

    @classmethod
    def from_json(cls, data: str | Mapping[str, Any]) -> TokenMethod:
        """Read what `to_json` gave, as a dictionary or as text: the class that its `method` names.

        Raises:
            GenpruneError: no JSON object, another method than this class, an unknown key, a newer format, or a value
                out of range.
        """
        try:
            values = dict(json.loads(data) if isinstance(data, str) else data)
            name, version = values.pop("method"), int(values.pop("format_version"))
        except (TypeError, ValueError, KeyError) as error:
            raise GenpruneError(
                f"this is no token method in JSON ({error}); expected an object with 'method' and 'format_version', "
                "as method.to_json() gives."
            ) from None
        if version > FORMAT_VERSION:
            raise GenpruneError(
                f"the token method has format {version}, this genprune reads up to {FORMAT_VERSION}. Upgrade with "
                "`pip install -U genprune`."
            )
        known = {method.name: method for method in (ZeroTPrune, ToMe) if issubclass(method, cls)}
        if name not in known:
            raise GenpruneError(
                f"token method {name!r}{nearest(str(name), known)}; expected one of {', '.join(known)}. Read any of "
                "them with TokenMethod.from_json."
            )
        return known[name]().changed(**{key: checks.from_json(value) for key, value in values.items()})

    def save(self, path: str | os.PathLike) -> None:
        """Write the method as a JSON file."""
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> TokenMethod:
        """Read what `save` wrote. Raises `PlanMismatch` where there is no such text, else see `from_json`."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanMismatch(
                f"'{path}' cannot be read ({error}); expected the JSON file that method.save writes. Check the path."
            ) from None
        return cls.from_json(text)


@dataclass(frozen=True)
class ZeroTPrune(TokenMethod):
    """Token pruning by votes over the attention graph, without training.

    The default is what measured best (docs/tokens-compared.md): one vote ranks the tokens, the most redundant ones
    are merged, in every second layer. `ZeroTPrune.published()` has the paper's own settings.

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
        seed: of `random`.

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
            object.__setattr__(self, "head_filter", tuple(self.head_filter))
            if len(self.head_filter) != 2 or not 0 <= self.head_filter[0] <= self.head_filter[1]:
                raise GenpruneError(
                    f"head_filter={self.head_filter}; expected (least, most) variance, 0 <= least <= most, such as "
                    "(0.01, 0.7). Pass None to keep all heads."
                )
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


@dataclass(frozen=True)
class ToMe(TokenMethod):
    """Token Merging, the merge baseline: every second token may merge into its most similar one of the others.

    Re-implemented from the paper: cosine of keys averaged over heads, alternate split, means weighted by size, between
    attention and MLP, log-size attention (`proportional`; the paper turns it off for MAE models).

    Args:
        r: tokens that go in every layer, >= 0; at most half of the patches do. None: as `keep` says.
        keep: instead of `r`. When neither is given 0.65.

    Reference:
        Bolya et al., arXiv 2210.09461.
    """

    keep: float | Mapping[int, float | int] | None = None
    reduce: str = "merge"
    placement: str = "before_mlp"
    proportional: bool = True
    r: int | None = None

    name: ClassVar[str] = "tome"
    fall: ClassVar[str] = "count"
    spacing: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.r is None and self.keep is None:
            object.__setattr__(self, "keep", 0.65)
        super().__post_init__()
        if self.r is not None:
            checks.check_whole("r", self.r, 0)
            if self.keep is not None:
                raise GenpruneError(
                    f"r={self.r} and keep={self.keep} both say how many tokens stay; expected one of them. Leave one "
                    "out."
                )

    def changed(self, **changes: Any) -> TokenMethod:
        """A copy with other values; a new `keep` takes the place of `r`, and the other way round."""
        if changes.get("keep") is not None:
            changes.setdefault("r", None)
        elif changes.get("r") is not None:
            changes.setdefault("keep", None)
        return super().changed(**changes)

    def counts(self, patches: int, depth: int) -> tuple[int, ...]:
        """Patches after each of `depth` layers: r fewer, at most half of them.

        Raises:
            GenpruneError: the method has `keep` and no `r`.
        """
        if self.r is None:
            raise GenpruneError(f"ToMe has keep={self.keep} and no r; expected ToMe(r=13) for counts by r. Set r.")
        counts = []
        for _ in range(depth):
            patches -= min(self.r, patches // 2)
            counts.append(patches)
        return tuple(counts)

    def _chosen(self, q: Tensor, k: Tensor, keep: int, view: LayerView) -> Choice:
        padding = ~view.valid if view.valid is not None else None
        return tome_matching(unit_keys(k), keep, view.prefix, padding)


def _full_precision(device: str) -> contextlib.AbstractContextManager:
    """Autocast would run the products of float32 scores in half precision."""
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
