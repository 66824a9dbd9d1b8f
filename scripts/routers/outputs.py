"""What a run leaves beside its checkpoints: router, routed pipeline, and a result that says how they came about."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import genprune as gp
from genprune.bench.result import environment
from genprune.files import whole_file
from genprune.model_source import ModelSource
from genprune.prune_run import disk_errors
from genprune.recover_run import RecoveryData
from genprune.recovery import NormalizedDistillation
from genprune.routers.finetuning import DONE
from scripts.masks.outputs import RESULT

ROUTER, ROUTED, EXPERTS = "router", "routed", "experts"


def write_outputs(
    args: argparse.Namespace,
    source: ModelSource,
    pipe: Any,
    router: Any,
    settings: gp.APTP,
    finetuning: NormalizedDistillation | None,
    data: RecoveryData,
    options: dict[str, Any],
    seconds: dict[str, float],
    device: torch.device,
    processes: int,
) -> Path:
    """The router with its fine-tuned experts, the routed pipeline where it is asked for, and the result last."""
    out = args.output_dir
    curve = json.loads((out / "curve.json").read_text())
    figures: dict[str, float] = {f"seconds/{name}": value for name, value in seconds.items()}
    figures |= {"steps": len(curve), "target": router.target, "share": router.trained_share}
    figures |= {f"share/{number}": share for number, share in enumerate(router.shares)}
    figures |= {f"usage/{number}": share for number, share in enumerate(router.usage)}
    if curve:
        figures["loss"] = curve[-1]["loss"]
    if device.type == "cuda":
        figures["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    with disk_errors(out):
        if finetuning is not None:
            router.save_pretrained(out / ROUTER)
        if args.save_pipeline:
            gp.route_pipeline(pipe.to("cpu"), router, store=args.store).save_pretrained(out / ROUTED)
    result = {
        **environment(device, processes),
        "kind": "router training",
        "seeds": {"router": settings.seed},
        "data": {"model": source.name} | data.to_json(),
        "settings": settings.to_json(),
        "finetuning": None if finetuning is None else finetuning.to_json() | {"split": args.finetune_split or "usage"},
        "pipeline_options": options,
        "router": router.summary(),
        "experts": [] if finetuning is None else _told(out / EXPERTS, len(router.experts)),
        "written": [ROUTER, *([ROUTED] if args.save_pipeline else [])],
        "figures": figures,
    }
    with disk_errors(out), whole_file(out / RESULT) as written:
        written.write_text(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return out / RESULT


def _told(folder: Path, count: int) -> list[dict[str, Any]]:
    """Steps, rows and figures of each expert's fine-tuning; of one without prompts zeros."""
    told = []
    for number in range(count):
        path = folder / f"expert-{number:02d}" / DONE
        note = json.loads(path.read_text()) if path.is_file() else {"steps": 0, "rows": 0, "figures": {}}
        told.append({name: note[name] for name in ("steps", "rows", "figures")})
    return told
