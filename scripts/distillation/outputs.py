"""What a run leaves beside its checkpoints: the recovered pipeline or LoRA, and a result."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from genprune import recover_run
from genprune.files import check_replaceable, whole_file, whole_folder
from genprune.model_source import ModelSource
from genprune.prune_run import disk_errors
from genprune.recover_run import RecoveryData
from genprune.recovery import NormalizedDistillation, RecoveryResult
from scripts.masks.outputs import DTYPES, RESULT

PIPELINE, LORA = "pipeline", "pytorch_lora_weights.safetensors"


def dtypes(args: argparse.Namespace) -> tuple[torch.dtype, torch.dtype]:
    """Of the student's and of the teacher's weights: what is trained is float32, what is frozen need not be."""
    low = DTYPES[args.mixed_precision]
    return (torch.float32 if args.rank is None else low), low


def write_outputs(
    args: argparse.Namespace,
    sources: tuple[ModelSource, ModelSource],
    pipe: Any,
    method: NormalizedDistillation,
    data: RecoveryData,
    result: RecoveryResult,
    options: dict[str, Any],
    device: torch.device,
    processes: int,
) -> Path:
    """The pipeline, unless a LoRA was trained, which `gp.recover` has written; and the result, which comes last."""
    out = args.output_dir
    with disk_errors(out):
        if method.lora_rank is None:
            check_replaceable(out / PIPELINE, "model_index.json", "a pipeline")
            with whole_folder(out / PIPELINE) as stage:
                pipe.to("cpu").save_pretrained(stage)
        told = recover_run.note(*sources, method, data, result, options, device, processes)
        told["written"] = PIPELINE if method.lora_rank is None else LORA
        with whole_file(out / RESULT) as written:
            text = json.dumps(told, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
            written.write_text(text, encoding="utf-8")
    return out / RESULT
