"""The naive loop against prefix reuse, change by change in turns in one process."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import genprune as gp
from genprune.families import family_of
from genprune.layers.prefix import called, changed_outputs
from genprune.layers.scoring_costs import reuse_costs
from genprune.layers.swapping import removal
from scripts.layer_scoring.hosts import HOSTS, meta_host, random_host

WAYS = {"naive": False, "reuse": True}


def measure(host: str, quick: bool, rounds: int, seed: int = 0) -> dict[str, Any]:
    """Score a host's removable layers both ways and time it.

    Each round scores every layer both ways: the unchanged model naively and with reuse, then the first layer both
    ways, and so on, so that whatever else the machine does falls on both.

    Args:
        host: name in `HOSTS`.
        quick: the host's smaller operating point and fewer layers.
        rounds: >= 1; figures are medians over them.
        seed: of weights, inputs and of who comes first.

    Returns:
        Counted MACs, seconds and CPU seconds of every round, the two ratios and the largest relative difference of
        the scores `||changed output - output||^2`; and beside the counted share of work that has to run its share of
        CPU time in the unchanged model (`share_behind`): where the two differ, some layers take more time for a
        multiply-accumulate than others, and what is over the measured share is the price of reuse itself.
    """
    spec = HOSTS[host]
    meta = meta_host(host)
    family = family_of(meta)
    point = family.operating_point(meta, **(spec.quick_point if quick else spec.point))
    sites = gp.find_sites(meta).of_kind(*spec.kinds)
    names = list(sites)[:: spec.quick_every if quick else 1]
    changes = {name: removal(meta, sites[name]) for name in names}
    inputs = family.example_inputs(meta, point, "meta", torch.float32)
    naive_macs, limit_macs = reuse_costs(meta, gp.count_costs(meta, **asdict(point)), changes, inputs)
    del meta, changes

    model = random_host(host, seed)
    torch.manual_seed(seed)
    inputs = family.example_inputs(model, point, "cpu", torch.float32)
    changes = {name: removal(model, sites[name]) for name in names}
    order = random.Random(seed)
    _one_call_each(model, inputs, changes, names[:1])  # warm-up
    behind = share_behind(model, inputs, changes)
    done = [_round(model, inputs, changes, order) for _ in range(rounds)]
    counted = limit_macs / naive_macs
    ratio = {clock: median(r[clock]["reuse"] / r[clock]["naive"] for r in done) for clock in ("wall", "cpu")}
    return {
        "host": host,
        "operating_point": asdict(point),
        "layers": len(names),
        "naive_macs": naive_macs,
        "limit_macs": limit_macs,
        "counted_ratio": counted,
        "rounds": done,
        "time_ratio": ratio["wall"],
        "cpu_time_ratio": ratio["cpu"],
        "cost_over_limit": ratio["wall"] / counted,
        "cpu_cost_over_limit": ratio["cpu"] / counted,
        "measured_behind_ratio": behind,
        "cpu_cost_over_measured_behind": ratio["cpu"] / behind,
        "score_relative_error": max(r["score_relative_error"] for r in done),
    }


def share_behind(model: nn.Module, inputs, changes, repeats: int = 3) -> float:
    """`limit / naive` of `reuse_costs` in CPU time instead of MACs, from when modules begin and end in the model.

    Stand-ins count as nothing. Median over `repeats` calls of the unchanged model.
    """
    paths = {path for change in changes.values() for path in change}
    return median(_share_behind(model, inputs, changes, paths) for _ in range(repeats))


def _share_behind(model: nn.Module, inputs, changes, paths: set[str]) -> float:
    began: dict[str, float] = {}
    ended: dict[str, float] = {}
    hooks = []
    for path in paths:
        module = model.get_submodule(path)
        hooks.append(module.register_forward_pre_hook(partial(_note, began, path)))
        hooks.append(module.register_forward_hook(partial(_note, ended, path)))
    started = time.process_time()
    called(model, inputs)
    whole = time.process_time() - started
    for hook in hooks:
        hook.remove()
    naive = behind = whole
    for change in changes.values():
        replaced = sum(ended[path] - began[path] for path in change)
        naive += whole - replaced
        behind += started + whole - min(began[path] for path in change) - replaced
    return behind / naive


def _note(times: dict[str, float], path: str, *call: Any) -> None:
    times.setdefault(path, time.process_time())


def _one_call_each(model: nn.Module, inputs, changes, names) -> None:
    for reuse in WAYS.values():
        for _ in changed_outputs(model, inputs, {name: changes[name] for name in names}, reuse=reuse):
            pass


def _round(model: nn.Module, inputs, changes, order: random.Random) -> dict[str, Any]:
    """Every layer once both ways."""
    ways = {way: changed_outputs(model, inputs, changes, reuse=reuse) for way, reuse in WAYS.items()}
    seconds = {clock: dict.fromkeys(WAYS, 0.0) for clock in ("wall", "cpu")}
    scores: dict[str, dict[str, float]] = {way: {} for way in WAYS}
    dense: dict[str, Tensor] = {}
    for _ in itertools.repeat(None, len(changes) + 1):
        for way in order.sample(list(WAYS), len(WAYS)):
            name, output = _timed(ways[way], seconds, way)
            if name:
                scores[way][name] = float((output.double() - dense[way].double()).square().sum())
            else:
                dense[way] = output
    worst = max(abs(scores["reuse"][name] - score) / score for name, score in scores["naive"].items())
    return {**seconds, "score_relative_error": worst}


def _timed(outputs: Iterator[tuple[str, Tensor]], seconds: dict[str, dict[str, float]], way: str):
    started, computed = time.perf_counter(), time.process_time()
    result = next(outputs)
    seconds["wall"][way] += time.perf_counter() - started
    seconds["cpu"][way] += time.process_time() - computed
    return result
