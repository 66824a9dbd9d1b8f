"""`train_depth`: which layers of each group stay, learned with low-rank updates beside (TinyFusion)."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genprune.denoising.batches import LossBatch
from genprune.denoising.calibration import Batch
from genprune.errors import BadCalibrationData, GenpruneError
from genprune.files import whole_file
from genprune.gates import GateHandle, attach_gates
from genprune.masks.checkpoints import Progress, checkpoints, load_checkpoint, save_checkpoint
from genprune.masks.depth_batches import BatchPool
from genprune.masks.depth_gates import drawn_gates
from genprune.masks.depth_groups import DepthGroup
from genprune.masks.depth_settings import DepthTraining
from genprune.masks.logits import MaskLogits, check_finite
from genprune.masks.low_rank import LowRankUpdates, low_rank_tensors
from genprune.sites import Sites

logger = logging.getLogger(__name__)
CURVE = "curve.json"


@dataclass(frozen=True)
class DepthProblem:
    """What depth is learned for.

    Args:
        model: the denoiser or classifier; unchanged by the training.
        sites: of it, all of them.
        groups: those with more than one way to choose.
        batches: what it is trained on.
    """

    model: nn.Module = field(repr=False)
    sites: Sites = field(repr=False)
    groups: Sequence[DepthGroup]
    batches: BatchPool = field(repr=False)


@dataclass(frozen=True)
class _NoBudget:
    """Checkpoints hold what steers a budget; here the groups fix it."""


@torch.inference_mode(False)
@torch.enable_grad()
def train_depth(
    problem: DepthProblem,
    settings: DepthTraining,
    seed: int = 0,
    *,
    output_dir: str | os.PathLike | None = None,
    resume: bool = False,
    checkpointing_steps: int = 25,
    progress: bool = True,
) -> tuple[list[Tensor], list[dict[str, float]]]:
    """Learn a logit for every way to keep `kept` layers of each group.

        minimise over logits l and updates U   E_m [ task(F_{m,U}) + distillation * d(F_{m,U}, F) ],   m ~ choice(l)
        a layer's output becomes   m * layer(x) + (1 - m) * x,   m drawn for each row of a batch

    Args:
        output_dir: gets `checkpoint-*` and `curve.json`; None: nothing is written.
        resume: go on from the newest checkpoint there, to the bit as without the interruption.
        checkpointing_steps: optimiser steps between checkpoints.

    Returns:
        The running mean of each group's logits, shape `(choices,)`, on the CPU, and one record a step.

    Raises:
        GenpruneError: loss or logits are not finite; the last checkpoint stays. Or `output_dir` has checkpoints, and
        `resume` is False. PlanMismatch: a checkpoint of another training. BadCalibrationData: distillation asked for
        with a loss of the user's own that does not call the model.
    """
    settings.check()
    run = _Run(problem, settings, seed)
    state = Progress(best=run.group_logits())
    found = checkpoints(output_dir) if output_dir is not None else []
    if found and not resume:
        raise GenpruneError(
            f"'{output_dir}' has checkpoints of an earlier training ({found[-1].name}); expected none. Pass "
            "resume=True to go on from it, or another output_dir."
        )
    if found:
        state = load_checkpoint(found[-1], run.trained, run.optimizer, _NoBudget(), run.described)
        logger.info("going on from %s", found[-1])
    with run.updates or nullcontext(), run.gates():
        for step in _bar(range(state.step, settings.train_steps), state, progress):
            state.curve.append({"step": step + 1, **run.step(step)})
            state.step = step + 1
            decay, now = settings.decay(step), run.group_logits()
            state.best = {name: decay * mean + (1 - decay) * now[name] for name, mean in state.best.items()}
            last = state.step == settings.train_steps
            if output_dir is not None and (last or state.step % checkpointing_steps == 0):
                # what a mask training keeps as its best logits is the running mean here
                save_checkpoint(output_dir, run.trained, run.optimizer, _NoBudget(), state, run.described)
    if output_dir is not None:
        with whole_file(Path(output_dir) / CURVE) as written:
            written.write_text(json.dumps(state.curve, indent=1) + "\n")
    return [state.best[_name(index)] for index in range(len(problem.groups))], state.curve


def _name(index: int) -> str:
    return f"group/{index:04d}"


def _bar(steps: range, state: Progress, shown: bool) -> Iterator[int]:
    from tqdm.auto import tqdm

    bar = tqdm(steps, initial=steps.start, total=steps.stop, desc="depth", unit="step", disable=not shown)
    for step in bar:
        if state.curve:
            bar.set_postfix(loss=f"{state.curve[-1]['loss']:.3g}")
        yield step


class _Run:
    """One training in progress."""

    def __init__(self, problem: DepthProblem, settings: DepthTraining, seed: int) -> None:
        self.problem, self.settings, self.seed = problem, settings, seed
        self.layers = [name for group in problem.groups for name in group.layers]
        device = next(problem.model.parameters()).device
        logits = {
            _name(index): torch.full((group.choices,), settings.logit_init, device=device)
            for index, group in enumerate(problem.groups)
        }
        updates: dict[str, Tensor] = {}
        if settings.lora_rank:
            paths = [problem.sites[name].path for name in self.layers]
            updates = low_rank_tensors(problem.model, paths, settings.lora_rank, seed)
        # logits and updates in one mapping of float32 leaves: what checkpoints hold
        self.trained = MaskLogits(logits | {f"lora/{name}": values for name, values in updates.items()})
        self.logits = [self.trained[name] for name in logits]
        lora = {name: self.trained[f"lora/{name}"] for name in updates}
        self.updates = LowRankUpdates(problem.model, lora, settings.lora_alpha) if lora else None
        groups = [{"params": self.logits, "lr": settings.learning_rate}]
        if lora:
            groups.append({"params": list(lora.values()), "lr": settings.lora_learning_rate})
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self.handle: GateHandle | None = None
        self.described: dict[str, Any] = {
            **asdict(settings),
            "seed": seed,
            "groups": [[list(group.layers), group.kept] for group in problem.groups],
            "batches": len(problem.batches),
        }

    def gates(self) -> GateHandle:
        """Gates on every layer of the groups, open."""
        self.handle = attach_gates(
            self.problem.model,
            {name: torch.ones(1, device=self.logits[0].device) for name in self.layers},
            self.problem.sites,
        )
        return self.handle

    def group_logits(self) -> dict[str, Tensor]:
        return {_name(index): values.detach().cpu().clone() for index, values in enumerate(self.logits)}

    def step(self, step: int) -> dict[str, float]:
        """One optimiser step; what the curve says of it."""
        parts = self.settings.gradient_accumulation_steps
        record = {"loss": 0.0, "task": 0.0, "distillation": 0.0, "temperature": self.settings.temperature(step)}
        for part in range(parts):
            number = step * parts + part
            terms = self._terms(self.problem.batches.batch(number), number, record["temperature"])
            loss = terms["task"] + self.settings.distillation * terms.get("distillation", 0.0)
            if not torch.isfinite(loss):
                raise GenpruneError(
                    f"the loss of step {step + 1} is {float(loss.detach())}; expected a finite one. Lower "
                    "lora_learning_rate, or run the model in bfloat16 or float32 instead of float16."
                )
            (loss / parts).backward()
            for name, value in {"loss": loss, **terms}.items():
                record[name] += float(value.detach()) / parts
        parameters = [values for values in self.trained.values() if values.grad is not None]
        nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        check_finite(self.trained, step + 1)
        return record

    def _terms(self, batch: Batch, number: int, temperature: float) -> dict[str, Tensor]:
        """The task's loss under a draw for every row, and how far the output is from the whole model's."""
        model, dense = self.problem.model, None
        with _Output(model) as output:
            if self.settings.distillation:
                dense = self._dense(batch, output)
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
            gates = drawn_gates(
                self.problem.groups,
                self.logits,
                batch.rows,
                scale=self.settings.logit_scale,
                temperature=temperature,
                generator=generator,
            )
            self._set(gates)
            terms = {"task": batch.losses(model).mean()}
            if dense is not None:
                terms["distillation"] = relative_distance(output.value, dense)
        return terms

    @torch.no_grad()
    def _dense(self, batch: Batch, output: _Output) -> Tensor:
        self._set({name: torch.ones(1, device=self.logits[0].device) for name in self.layers})
        with self.updates.off() if self.updates else nullcontext():
            batch.losses(self.problem.model)
        if output.value is None:
            raise BadCalibrationData(
                f"the loss of a {type(batch).__name__ if not isinstance(batch, LossBatch) else 'loss_fn'} called no "
                "model; expected one call of it, to compare its output. Call model(...) in loss_fn, or pass "
                "distillation=0."
            )
        return output.value.detach()

    def _set(self, gates: Mapping[str, Tensor]) -> None:
        for name, value in gates.items():
            self.handle[name] = value


def relative_distance(output: Tensor, dense: Tensor) -> Tensor:
    """`||f - f_dense||^2 / ||f_dense||^2`, the mean over rows; a scalar. Logits and predictions alike."""
    output, dense = output.float().flatten(1), dense.float().flatten(1)
    return ((output - dense).square().sum(1) / dense.square().sum(1).clamp_min(1e-12)).mean()


class _Output:
    """What the model returned last, while it is attached."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.value = model, None

    def hook(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        self.value = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)

    def __enter__(self) -> _Output:
        self._handle = self.model.register_forward_hook(self.hook)
        return self

    def __exit__(self, *error) -> None:
        self._handle.remove()
