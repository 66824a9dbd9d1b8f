"""Quality of routed pipelines on the miniatures: rows of every candidate before and after fine-tuning."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from genprune import miniature
from genprune.routers.encoders import TransformersEncoder
from scripts.ecodiff.bases import DRAW_ROWS, Base, bases, latents_of, pictures_of
from scripts.ecodiff.figures import TEST_SEED, Dense, Judge
from scripts.layers.recovering import DATA_SEED

from .candidates import BUDGETS, CANDIDATES, FAR_APART_AT, FINETUNE, Candidate
from .difficulty import difficulty_of
from .measures import control_rows, prompt_map, retrieval
from .routers import Routers


def quality(arguments: argparse.Namespace) -> dict[str, Any]:
    """All bases and budgets; stages that are done are read from disk."""
    judge = Judge(arguments.num_prompts)
    chosen = [base for name, base in bases().items() if name in (arguments.base or ("unet", "mmdit"))]
    return {base.name: judge_base(base, judge, arguments) for base in chosen}


def data_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What rows were trained and judged on."""
    judged = miniature.prompts("test", arguments.num_prompts, TEST_SEED)
    return {
        "test_captions": len(judged),
        "test_captions_sha256": hashlib.sha256(json.dumps(judged).encode()).hexdigest(),
        "test_seed": TEST_SEED,
        "train_scenes": arguments.samples,
        "train_scenes_seed": DATA_SEED,
        "router_steps": arguments.train_steps,
        "finetuning": {base: {f"{keep:g}": share for keep, share in each.items()} for base, each in FINETUNE.items()},
        "encoder": TransformersEncoder(arguments.encoder).to_json() | {"source": "ENCODER"},
    }


def judge_base(base: Base, judge: Judge, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rows of one base by budget and label."""
    pipe = base.load()
    pipe.set_progress_bar_config(disable=True)
    routers = Routers(
        base,
        pipe,
        arguments.work,
        arguments.ecodiff_work,
        arguments.layers_work,
        arguments.encoder,
        arguments.samples,
        arguments.train_steps,
    )
    dense = _dense(base, pipe, judge, arguments.work / base.name)
    rows: dict[str, Any] = {
        "dense": judge.figures(dense.pictures, dense.latents, None) | retrieval(dense.pictures, judge.scenes),
        "controls": control_rows(judge, dense),
    }
    budgets = arguments.budgets or BUDGETS
    wanted = [(keep, each) for keep in budgets for each in CANDIDATES if _is_wanted(each, keep, arguments)]
    for keep, candidate in wanted:
        for stage in arguments.stages:
            began = time.perf_counter()
            file = arguments.work / base.name / f"rows-{judge.count}" / f"{candidate.slug}@{keep:g}.json"
            if not file.is_file():
                router = routers.trained(candidate, keep)
                if stage in ("finetune", "draw"):
                    tuned = routers.finetuned(candidate, keep, router)
                if stage == "draw":
                    points = {"0": router, f"{FINETUNE[base.name][keep]:g}": tuned}
                    row = _row(base, pipe, judge, dense, routers, candidate, keep, points, arguments.work)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(json.dumps(row) + "\n")
                seconds = time.perf_counter() - began
                print(f"{base.name} {keep:g} {candidate.label}: {stage}, {seconds:.0f} s", file=sys.stderr, flush=True)
            if file.is_file():
                rows.setdefault(f"{keep:g}", {})[candidate.label] = json.loads(file.read_text())
    return rows


def _is_wanted(candidate: Candidate, keep: float, arguments: argparse.Namespace) -> bool:
    if arguments.only and candidate.slug not in arguments.only:
        return False
    return not candidate.changes or keep in FAR_APART_AT


def _row(
    base: Base,
    pipe: Any,
    judge: Judge,
    dense: Dense,
    routers: Routers,
    candidate: Candidate,
    keep: float,
    points: dict[str, Any],
    work: Path,
) -> dict[str, Any]:
    """Costs and routes of a candidate, and its figures at each point of fine-tuning."""
    plain = points["0"]
    routes = routers.routes(candidate, plain, judge.prompts)
    shares = [expert.share for expert in plain.experts]
    usage = [expert.usage for expert in plain.experts]
    mean = sum(shares[k] for k in routes) / len(routes) if routes else sum(u * s for u, s in zip(usage, shares))
    row = {
        **candidate.to_json(),
        "keep": keep,
        "shares": [round(share, 5) for share in shares],
        "params": [e.plan.figures["params"] / e.plan.figures["dense_params"] for e in plain.experts],
        "usage": usage,
        "test_share": mean,
        "test_rows": None if routes is None else [routes.count(k) for k in range(len(shares))],
        "overlap": _overlap([expert.plan for expert in plain.experts]),
        "curve": routers.curve(candidate, keep),
        "points": {},
    }
    for share, router in points.items():
        file = work / base.name / f"drawn-{judge.count}" / f"{candidate.slug}@{keep:g}-{share}.safetensors"
        latents, pictures = drawn(file, base, pipe, router, routes, judge.prompts)
        row["points"][share] = judge.figures(pictures, latents, dense) | retrieval(pictures, judge.scenes)
        right = judge.grade(pictures, judge.scenes)["grade(all)"].double()
        row["points"][share]["right"] = [int(value) for value in right]  # for paired differences
        if routes is not None and len(shares) > 1:
            row["points"][share]["by_expert"] = _by_expert(right, routes, len(shares))
    if routes is not None and len(shares) > 1 and not candidate.random:
        row["difficulty"] = difficulty_of(base, pipe, plain, work / base.name / "difficulty.safetensors")
        row["map"] = prompt_map(plain)
    return row


def drawn(
    file: Path, base: Base, pipe: Any, router: Any, routes: list[int] | None, prompts: list[str]
) -> tuple[Tensor, Tensor]:
    """Latents and pictures of the test captions through the routed pipeline, from disk where they are."""
    if not file.is_file():
        from genprune.pipelines import RoutedPipeline

        routed = RoutedPipeline(pipe, router, store="materialised")
        routed.set_progress_bar_config(disable=True)
        parts = []
        for start in range(0, len(prompts), DRAW_ROWS * 4):  # groups of a call are then of some size
            chosen = slice(start, start + DRAW_ROWS * 4)
            seeds = range(TEST_SEED + start, TEST_SEED + start + len(prompts[chosen]))
            parts.append(
                routed(
                    prompts[chosen],
                    expert=None if routes is None else routes[chosen],
                    generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                    num_inference_steps=base.steps,
                    output_type="latent",
                    **_for_rows(base.options, len(prompts[chosen])),
                ).images
            )
        latents = torch.cat(parts)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"latents": latents.contiguous(), "pictures": pictures_of(pipe, latents)}, file)
    found = load_file(file)
    return found["latents"], found["pictures"]


def _for_rows(options: dict, rows: int) -> dict:
    return {name: [value] * rows if name == "negative_prompt" else value for name, value in options.items()}


def _dense(base: Base, pipe: Any, judge: Judge, folder: Path) -> Dense:
    file = folder / f"drawn-{judge.count}" / "dense.safetensors"
    if not file.is_file():
        latents = latents_of(pipe, base, judge.prompts, TEST_SEED)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"latents": latents.contiguous(), "pictures": pictures_of(pipe, latents)}, file)
    found = load_file(file)
    right = judge.grade(found["pictures"], judge.scenes)["grade(all)"].double()
    return Dense(found["latents"], found["pictures"], right)


def _overlap(plans: list) -> float | None:
    """Mean overlap of what two experts remove: 1 where all experts are the same."""
    pairs = [(one, other) for index, one in enumerate(plans) for other in plans[index + 1 :]]
    return sum(one.overlap(other) for one, other in pairs) / len(pairs) if pairs else None


def _by_expert(right: Tensor, routes: list[int], experts: int) -> list[dict | None]:
    """Test captions and the share that is right, for each expert."""
    place = torch.tensor(routes)
    return [
        {"prompts": int((place == k).sum()), "all_right": float(right[place == k].mean())} if k in routes else None
        for k in range(experts)
    ]
