"""What a run leaves: a plan for each budget, the pipelines cut by them, and a result that says how they came about."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

import genprune as gp
from genprune.bench.result import environment
from genprune.errors import GenpruneError
from genprune.files import whole_file, whole_folder
from genprune.methods import Method
from genprune.model_source import ModelSource
from genprune.prune_run import FolderInTheWay, disk_errors
from genprune.scores import Scores

RESULT = "result.json"


def check_output(folder: Path, resume: bool) -> None:
    """Refuse a folder with checkpoints or a result of another run. Raises `FolderInTheWay`."""
    if folder.exists() and not folder.is_dir():
        raise FolderInTheWay(f"'{folder}' is a file; expected a folder to write to. Pass another --output_dir.")
    found = sorted(path.name for path in folder.glob("checkpoint-*")) + [RESULT] * (folder / RESULT).is_file()
    if found and not resume:
        raise FolderInTheWay(
            f"'{folder}' holds {found[-1]} of an earlier run; expected a new folder. Pass --resume_from_checkpoint "
            "latest to go on there, or another --output_dir."
        )


def check_reachable(pipe: Any, method: Method, keeps: list[float], point: dict[str, int] | None) -> None:
    """Raises `BudgetUnreachable` for a budget that no plan meets: before the training, not after it."""
    shared = ("of", "kinds", "allocation", "min_keep", "round_to", "max_width_classes", "protect")
    scores = gp.score(pipe, gp.Random(**{name: getattr(method, name) for name in shared}), operating_point=point)
    for keep in keeps:
        scores.plan(keep=keep)


def write_outputs(
    args: argparse.Namespace,
    source: ModelSource,
    scores: Scores,
    options: dict[str, Any],
    device: torch.device,
    processes: int,
    seconds: float,
) -> Path:
    """Plans, pipelines where they are asked for, and the result, which comes last."""
    out = args.output_dir
    figures: dict[str, float] = {name: value for name, value in scores.made_by["training"].items()}
    figures |= {"dense_params": scores.dense.params, "dense_macs": scores.dense.macs, "seconds": seconds}
    if device.type == "cuda":
        figures["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    plans = []
    for keep in args.keep:
        plan = scores.plan(keep=keep)
        entry = {"keep": keep, "of": scores.method.of, "reached": plan.made_by["budget"]["reached"]}
        with disk_errors(out):
            entry["plan"] = plan.save(out / f"plan-{keep:g}").name
            if args.save_pipeline:
                entry["pipeline"] = _save_pipeline(source, plan, out / f"pipeline-{keep:g}", args).name
        figures |= {f"{name}/{keep:g}": plan.figures[name] for name in ("params", "macs")}
        plans.append(entry)
    result = {
        **environment(device, processes),
        "kind": "mask training",
        "seeds": {"masks": scores.method.seed},
        "data": {"model": source.name} | {name: scores.made_by.get(name) for name in ("prompts", "prompts_sha256")},
        "settings": scores.method.to_json(),
        "operating_point": dataclasses.asdict(scores.dense.operating_point),
        "pipeline_options": options,
        "plans": plans,
        "figures": figures,
    }
    with disk_errors(out), whole_file(out / RESULT) as written:
        written.write_text(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return out / RESULT


def _save_pipeline(source: ModelSource, plan: gp.PruningPlan, folder: Path, args: argparse.Namespace) -> Path:
    # read anew, and cut while it is read: the trained one is on an accelerator, perhaps in shards
    pipe = gp.load_pipeline(source.place, plan=plan, torch_dtype=DTYPES[args.mixed_precision])
    with whole_folder(folder) as stage:
        pipe.save_pretrained(stage)
    return folder


DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_pipeline(source: ModelSource) -> None:
    """Raises `GenpruneError` for a bare model."""
    if source.kind != "pipeline":
        raise GenpruneError(
            f"'{source.name}' is a model without a pipeline; expected a whole pipeline, because masks are learned "
            "through its denoising chain. Pass the pipeline's folder or hub id."
        )
