"""What serving a mixed batch costs beside its groups on really cut pipelines: stores, switches, routing."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from genprune import miniature
from genprune.metrics.bootstrap import bootstrap_interval, median
from genprune.metrics.latency import LatencyComparison, compare_latency
from genprune.pipelines import MaterialisedStore, ReorderedStore, RoutedPipeline

from .serving_bases import Served, cut_pipelines, experts, served, untrained_router


def serving(quick: bool, encoder: str | None, only: list[str] | None = None) -> dict[str, Any]:
    """One entry for each pipeline that is served."""
    found = {}
    for each in served():
        if only is not None and each.name not in only:
            continue
        found[each.name] = case(each, quick, encoder)
        ratio = found[each.name]["ratio"]["reordered"]["estimate"]
        print(f"{each.name}: a mixed batch takes {ratio:.3f} of its groups", file=sys.stderr, flush=True)
    return found


@torch.no_grad()
def case(base: Served, quick: bool, encoder: str) -> dict[str, Any]:
    """Times of one pipeline.

    `separate` runs the groups of the batch one after another on pipelines that `gp.cut` made before, with the routes
    known; `reordered` and `materialised` are the same 64 prompts through a routed pipeline, routing and switches
    included. `route` is routing alone.
    """
    count, rounds = (16, 3) if quick else (64, base.rounds)
    pipe, options = base.load(), base.call_options(quick)
    prompts = miniature.prompts("test", count, seed=0)
    chosen = experts(pipe)
    router = untrained_router(pipe, chosen, prompts, None if base.own_encoder else encoder)
    groups = router.route(prompts, unfamiliar="nearest").groups()
    cuts = cut_pipelines(pipe, [expert.plan for expert in chosen])

    def seeded(indices: list[int]) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(index) for index in indices]

    def separate() -> None:
        for expert, members in groups.items():
            cuts[expert]([prompts[index] for index in members], generator=seeded(members), **options)

    # one model each: two stores take no turns on one
    routed = {
        store: RoutedPipeline(base.load(), router, store, unfamiliar="nearest", check_weights=False)
        for store in base.stores
    }
    calls = {
        "separate": separate,
        **{s: lambda s=s: routed[s](prompts, generator=seeded(list(range(count))), **options) for s in base.stores},
        "route": lambda: router.route(prompts, unfamiliar="nearest"),
    }
    if encoder and base.own_encoder:
        sentences = untrained_router(pipe, chosen, prompts, encoder)
        calls["route by a sentence encoder"] = lambda: sentences.route(prompts, unfamiliar="nearest")
    times = compare_latency(calls, "separate", rounds=rounds, warmup=1)
    switches = {store: switch_times(base, store, chosen, 2 if quick else 5) for store in base.stores}
    return {
        "prompts": count,
        "options": {name: value for name, value in options.items() if name != "output_type"},
        "parameter_mb": sum(p.nbytes for p in pipe.unet.parameters()) / 1e6,
        "macs_kept": [expert.share for expert in chosen],
        "group_sizes": [len(members) for members in groups.values()],
        "times": times.to_json(),
        "ratio": {store: times.ratio[store].to_json() for store in base.stores},
        "encoder": router.encoder.name if base.own_encoder else "sentence encoder",
        "routing_share": {name: _shares(times, name).to_json() for name in calls if name.startswith("route")},
        "switch_ms": {store: found.to_json() for store, found in switches.items()},
        "switch_share": {s: len(groups) * switches[s].estimate / times.median_ms[s] for s in base.stores},
    }


def _shares(times: LatencyComparison, name: str):
    """Time of routing over the time of the routed call of the same round."""
    route, call = (torch.tensor(times.samples_ms[each], dtype=torch.float64) for each in (name, "reordered"))
    return bootstrap_interval(route / call, median)


def switch_times(base: Served, store: str, chosen: list, turns: int):
    """Milliseconds of activating another expert, over turns through all of them; the first turn is not counted."""
    model = base.load().unet
    held = (ReorderedStore if store == "reordered" else MaterialisedStore)(model, chosen)
    found = []
    for turn in range(turns + 1):
        for expert in range(len(chosen)):
            began = time.perf_counter()
            held.activate(expert)
            if turn:
                found.append((time.perf_counter() - began) * 1000)
    return bootstrap_interval(torch.tensor(found), median)


def serving_figures(found: dict[str, Any]) -> dict[str, float]:
    """`batch_cost_ratio` and `routing_share`: the worst of those with 20 guided steps, with the default store."""
    usual = [part for name, part in found.items() if not name.endswith("few steps")]
    figures = {
        "batch_cost_ratio": max(part["ratio"]["reordered"]["estimate"] for part in usual),
        "routing_share": max(part["routing_share"]["route"]["estimate"] for part in usual),
    }
    for name, part in found.items():
        name = name.replace(", ", "_").replace(" ", "_")
        for way, share in part["routing_share"].items():
            figures[f"routing_share_{name}" + way.removeprefix("route").replace(" ", "_")] = share["estimate"]
        for store in part["ratio"]:
            figures[f"batch_cost_ratio_{name}_{store}"] = part["ratio"][store]["estimate"]
            figures[f"switch_ms_{name}_{store}"] = part["switch_ms"][store]["estimate"]
            figures[f"switch_share_{name}_{store}"] = part["switch_share"][store]
    return figures


def serving_lines(parts: dict[str, Any]) -> list[str]:
    """The tables of serving and of memory for the page."""
    lines = []
    if "serving" in parts:
        lines += [
            "Eight experts at 50 to 70 % of the MACs; a mixed batch, routing and switches included, over the time of "
            "its groups run one after another on pipelines cut before. `routing`: its share of the call, by the "
            "pipeline's own text encoder and then by the sentence encoder on the miniature, by the sentence encoder "
            "on the large one (random weights). 20 guided steps; `few steps` are 8 without guidance.",
            "",
            "| pipeline | store | time over separate groups | a switch | of the call | routing |",
            "|---|---|---|---|---|---|",
        ]
        for name, part in parts["serving"]["found"].items():
            for store in part["ratio"]:
                ratio, switch = part["ratio"][store], part["switch_ms"][store]
                routing = ", ".join(f"{share['estimate']:.2%}" for share in part["routing_share"].values())
                lines.append(
                    f"| {name}, {part['parameter_mb']:.0f} MB, {part['prompts']} prompts in "
                    f"{len(part['group_sizes'])} groups | {store} | {_told(ratio, '.3f')} | {_told(switch, '.1f')} ms "
                    f"| {part['switch_share'][store]:.1%} | {routing} |"
                )
    if "memory" in parts:
        found = parts["memory"]["found"]
        lines += [
            "",
            "| served by a fresh process | peak | without libraries | over the dense model |",
            "|---|---|---|---|",
        ]
        for name, row in found["rows"].items():
            ratio = row["extra_bytes"] / found["rows"]["dense"]["extra_bytes"]
            lines.append(
                f"| {name} | {row['peak_bytes'] / 1e6:.0f} MB | {row['extra_bytes'] / 1e6:.0f} MB | {ratio:.3f} |"
            )
    return lines


def _told(interval: dict[str, Any], form: str) -> str:
    return f"{interval['estimate']:{form}} [{interval['low']:{form}}, {interval['high']:{form}}]"
