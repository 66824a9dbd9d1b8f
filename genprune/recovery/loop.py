"""The loop over the steps of a recovery: checkpoints, validation, and what happens on a failure or Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from genprune.families import denoiser
from genprune.recovery.checkpoints import Snapshots, load_checkpoint
from genprune.recovery.curve import Curve
from genprune.recovery.training import RecoveryFailed, RecoveryTraining

logger = logging.getLogger(__name__)
Validation = Callable[[int, Any], Mapping[str, float]]


@dataclass(frozen=True)
class RecoveryResult:
    """What a recovery did.

    Args:
        steps: optimiser steps done, those before a resume included.
        curve: one record a step: `step`, `loss`, `learning_rate`, `gradient_norm`, `terms` (name -> `raw`, `weight`,
            `weighted`; a feature's name is its module path, `path[0]` and `path[1]` for two streams), and
            `validation` where it was taken.
        figures: `samples_per_second` and `seconds` of this call, `trained_parameters`, `loss` of the last step.
        pairs: (student's path, teacher's path) of the features.
        output_dir: with checkpoints, `curve.jsonl` and, for a LoRA, `pytorch_lora_weights.safetensors`; or None.
    """

    steps: int
    curve: list[dict[str, Any]] = field(repr=False)
    figures: dict[str, float]
    pairs: tuple[tuple[str, str], ...] = field(repr=False)
    output_dir: Path | None = None


class RecoveryRun:
    """One run of the loop.

    Args:
        training: does the steps.
        snapshots: where states are kept.
        target: what `validation` gets.
        validation, validation_steps, checkpointing_steps: see `recover`.
    """

    def __init__(
        self,
        training: RecoveryTraining,
        snapshots: Snapshots,
        target: Any,
        validation: Validation | None,
        validation_steps: int | None,
        checkpointing_steps: int,
    ) -> None:
        self.training, self.snapshots, self.target = training, snapshots, target
        self.validation, self.validation_steps = validation, validation_steps
        self.checkpointing_steps = checkpointing_steps
        self.state, self.settings, self.accelerator = training.state, training.settings, training.accelerator

    def to_the_end(
        self, checkpoint: Path | None, output_dir: str | os.PathLike | None, progress: bool
    ) -> RecoveryResult:
        if checkpoint is not None:
            load_checkpoint(checkpoint, self.state, self.snapshots.described)
            logger.info("going on from %s", checkpoint)
        main = self.accelerator.is_main_process
        curve = Curve(output_dir, self.state.step, main)
        self.accelerator.wait_for_everyone()  # all have read the curve before one writes it
        curve.begin()
        if checkpoint is None:
            self.training.look_at_teacher()
            self.snapshots.save(self.state)
        begun, first = time.perf_counter(), self.state.step
        try:
            self._steps(curve, progress and main)
        except KeyboardInterrupt:
            if output_dir is not None and main and self.state.step > first:
                self.snapshots.save(self.state)
            raise
        except RecoveryFailed as failure:
            raise self._restored(failure) from None
        seconds = time.perf_counter() - begun
        if self.state.average is not None:
            self.state.average.put()
        done = self.state.step - first
        rows = self.settings.batch_size * self.settings.gradient_accumulation * self.accelerator.num_processes
        figures = {
            "seconds": seconds,
            "samples_per_second": done * rows / seconds if done else 0.0,
            "trained_parameters": sum(parameter.numel() for parameter in self.state.parameters.values()),
        }
        if curve.records:
            figures["loss"] = curve.records[-1]["loss"]
        folder = None if output_dir is None else Path(output_dir)
        return RecoveryResult(self.state.step, curve.records, figures, tuple(self.training.pairs), folder)

    def _steps(self, curve: Curve, shown: bool) -> None:
        from tqdm.auto import tqdm

        first, last = self.state.step, self.settings.steps
        saved = first
        bar = tqdm(range(first, last), initial=first, total=last, desc="recovery", unit="step", disable=not shown)
        for _ in bar:
            record = self.training.step()
            done = self.state.step
            every = self.validation_steps
            try:
                if self.validation is not None and (done == last or (every is not None and done % every == 0)):
                    record["validation"] = self._validated(done)
            finally:
                curve.add(record)
            self.accelerator.log(_flat(record), step=done)
            bar.set_postfix(loss=f"{record['loss']:.3g}")
            # not among steps whose loss is too high: the last good checkpoint has to stay
            if done == last or (done - saved >= self.checkpointing_steps and not self.state.guard.above):
                self.snapshots.save(self.state)
                saved = done

    def _validated(self, done: int) -> dict[str, Any]:
        """The callback's numbers, with the averaged weights in place."""
        numbers: dict[str, Any] = {}
        average = self.state.average
        with contextlib.nullcontext() if average is None else average.in_place():
            if self.accelerator.is_main_process:
                with torch.no_grad():
                    numbers = dict(self.validation(done, self.target) or {})
        denoiser(self.target).eval()
        self.accelerator.wait_for_everyone()
        return numbers

    def _restored(self, failure: RecoveryFailed) -> RecoveryFailed:
        """The failure in full, after the last good weights were put back."""
        step = self.snapshots.go_back(self.state, failure.since)
        self.accelerator.wait_for_everyone()
        self.snapshots.delete_after(step)
        where = "in memory" if self.snapshots.folder is None else f"in '{self.snapshots.folder}'"
        message = (
            f"{failure}; expected finite terms and a loss near those before. The weights are those after step {step} "
            f"again, from the last good checkpoint {where}. Lower learning_rate (now "
            f"{self.settings.learning_rate:g}), raise warmup_steps or batch_size, or use mixed_precision='bf16' "
            "instead of 'fp16'."
        )
        return RecoveryFailed(message, failure.step, failure.since)


def _flat(record: Mapping[str, Any]) -> dict[str, float]:
    """A record as trackers take it."""
    flat = {name: record[name] for name in ("loss", "learning_rate", "gradient_norm")}
    for term, values in record["terms"].items():
        flat |= {f"{kind}/{term}": value for kind, value in values.items()}
    return flat | {f"validation/{name}": value for name, value in record.get("validation", {}).items()}
