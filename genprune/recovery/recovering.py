"""`recover`: train what a cut left against the dense model, in place."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from genprune.errors import GenpruneError, PlanMismatch
from genprune.families import denoiser, denoiser_slot
from genprune.masks.checkpoints import checkpoints
from genprune.plan import PruningPlan
from genprune.recovery.accelerators import accelerator_of, check_accelerator
from genprune.recovery.checkpoints import Snapshots
from genprune.recovery.distillation import NormalizedDistillation
from genprune.recovery.loop import RecoveryResult, RecoveryRun, Validation
from genprune.recovery.lora_training import ADAPTER, attach_lora, save_lora
from genprune.recovery.models import described_model, on_device, teaching, trained_parameters, training_mode
from genprune.recovery.own_data import own_data
from genprune.recovery.pairing import feature_pairs
from genprune.recovery.pipeline_data import PipelineData, cache_folder, pipeline_data
from genprune.recovery.training import RecoveryTraining


@torch.inference_mode(False)
@torch.enable_grad()
def recover(
    target: Any,
    teacher: Any,
    method: NormalizedDistillation,
    *,
    prompts: Sequence[str] | None = None,
    data: Any = None,
    plan: PruningPlan | None = None,
    output_dir: str | os.PathLike | None = None,
    resume: bool = False,
    checkpointing_steps: int = 500,
    checkpoints_total_limit: int = 2,
    validation: Validation | None = None,
    validation_steps: int | None = None,
    pipeline_options: Mapping[str, Any] | None = None,
    accelerator: Any = None,
    log_with: str | None = None,
    progress: bool = True,
) -> RecoveryResult:
    """Train a cut model to answer like the dense one again, in place; the teacher is not changed.

    Both run in evaluation mode: without dropout, as they will be used. Under `accelerate launch` every process takes
    its own rows; n processes equal one with n times the batch.

    Args:
        target: a pipeline or model that was cut, a stock export of one, or a dense model.
        teacher: the dense pipeline or model, with weights of its own.
        method: how.
        prompts: of a text-to-image pipeline. Without `data` the teacher draws a latent for each, once.
        data: for a pipeline, clean latents `(n, C, h, w)`, images `(n, 3, H, W)` in [0, 1] or PIL images, one a
            prompt. For bare models, `(inputs, target)` batches of a denoiser, or `(images, labels)` batches or a
            dataset of `(image, label)` for a timm classifier. All of them are held in memory, but for a dataset.
            Or the `PipelineData` of an earlier call of `pipeline_data` with this teacher, which has the prompts.
        plan: what the target was cut by, where it is a stock export with renumbered blocks.
        output_dir: gets `checkpoint-*`, `curve.jsonl` and `teacher_data`. None: nothing is written.
        resume: go on from the newest checkpoint there, to the bit as without the interruption; from the start where
            there is none yet.
        checkpointing_steps, checkpoints_total_limit: steps between checkpoints, and how many stay (at least 2).
        validation: `validation(step, target) -> {name: number}`, called by the main process every `validation_steps`
            and at the end, with the averaged weights in place where there are some; its numbers go into the curve.
        pipeline_options: keyword arguments of the pipeline's call, such as height, width, max_sequence_length.
        accelerator: one of your own; otherwise one is made with `method.mixed_precision`.
        log_with: trackers of accelerate, such as `tensorboard`.
        progress: show progress bars.

    Returns:
        A `RecoveryResult`. With `ema_decay` the target has the averaged weights.

    Raises:
        RecoveryFailed (a `GenpruneError`): a term or gradient is not finite, or the loss diverges; the weights are
        those of the last good checkpoint. BadCalibrationData: prompts or data do not fit. PlanMismatch: outputs or
        features of other shapes, or a checkpoint of another run. KeyboardInterrupt: after a checkpoint was written.
    """
    _check_arguments(method, output_dir, resume, checkpointing_steps, checkpoints_total_limit, validation_steps)
    student, dense = denoiser(target), denoiser(teacher)
    _check_apart(student, dense)
    found = [] if output_dir is None else checkpoints(output_dir)
    if found and not resume:
        raise GenpruneError(
            f"'{output_dir}' has checkpoints of an earlier recovery ({found[-1].name}); expected none. Pass "
            "resume=True to go on from it, or another output_dir."
        )
    pairs = []
    if method.feature_weight:
        pairs = feature_pairs(student, dense, plan=plan, pairing=method.pairing, pairs=method.pairs)
    with (
        accelerator_of(accelerator, method, log_with, output_dir, "genprune-recovery") as accelerator,
        teaching(dense, accelerator.device),
    ):
        check_accelerator(accelerator, method)
        made = isinstance(data, PipelineData)
        pipes = () if made else (teacher, target)
        with accelerator.main_process_first(), on_device(pipes, accelerator.device):
            if made:
                rows = dataclasses.replace(data, settings=method)
            elif denoiser_slot(target) is None and denoiser_slot(teacher) is None:
                rows = own_data(student, data, method)
            else:
                cache, options = cache_folder(output_dir), dict(pipeline_options or {})
                main = accelerator.is_main_process
                rows = pipeline_data(target, teacher, method, prompts, data, options, cache, progress and main, main)
        if method.lora_rank is not None:
            attach_lora(student, method.lora_rank, method.seed)
        trained = trained_parameters(student, method.lora_rank is not None, ADAPTER)
        with training_mode(student, trained, accelerator.device, method.gradient_checkpointing):
            training = RecoveryTraining(student, dense, pairs, trained, rows, method, accelerator)
            described = {
                **{name: value for name, value in method.to_json().items() if name != "batch_size"},
                "rows_per_micro_batch": method.batch_size * accelerator.num_processes,
                "model": described_model(student, trained),
                "feature_pairs": pairs,
                "data": rows.fingerprint,
            }
            writes = accelerator.is_main_process
            snapshots = Snapshots(output_dir, described, writes, checkpoints_total_limit)
            run = RecoveryRun(training, snapshots, target, validation, validation_steps, checkpointing_steps)
            try:
                result = run.to_the_end(found[-1] if found else None, output_dir, progress)
            finally:
                training.remove()
        if output_dir is not None and method.lora_rank is not None and writes:
            save_lora(target, output_dir)
    return result


def _check_arguments(
    method: Any,
    output_dir: str | os.PathLike | None,
    resume: bool,
    checkpointing_steps: int,
    limit: int,
    validation_steps: int | None,
) -> None:
    if not isinstance(method, NormalizedDistillation):
        raise GenpruneError(
            f"method is {method!r}; expected a way to recover. Pass gp.NormalizedDistillation(steps=1000), say."
        )
    if resume and output_dir is None:
        raise GenpruneError("resume=True without output_dir; expected the folder with the checkpoints. Pass it.")
    named = {"checkpointing_steps": checkpointing_steps, "checkpoints_total_limit": limit}
    if validation_steps is not None:
        named["validation_steps"] = validation_steps
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise GenpruneError(f"{name}={value!r}; expected a whole number of at least 1. Pass one.")


def _check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Raises `PlanMismatch` where training the student would train the teacher."""
    own = {parameter.data_ptr() for parameter in teacher.parameters() if parameter.numel()}
    for name, parameter in student.named_parameters():
        if parameter.numel() and parameter.data_ptr() in own:
            raise PlanMismatch(
                f"target and teacher share the weights of '{name}'; expected a teacher of its own. Load the dense "
                "model again, or cut copy.deepcopy(model)."
            )
