"""`train_masks`: logits learned through the whole denoising chain under a falling budget (EcoDiff)."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genprune.errors import BudgetUnreachable, GenpruneError
from genprune.families import denoiser
from genprune.files import whole_file
from genprune.masks.batches import PromptBatches
from genprune.masks.budget import BudgetController, expected_share
from genprune.masks.checkpoints import Progress, checkpoints, load_checkpoint, save_checkpoint
from genprune.masks.logits import MaskLogits, check_finite
from genprune.masks.objectives import OBJECTIVES, DenseLatents
from genprune.masks.penalties import PENALTIES
from genprune.masks.processes import averaged, process_rank, summed
from genprune.masks.settings import MaskTraining
from genprune.masks.step_gates import LearnedGates
from genprune.masks.validation import PlanLook
from genprune.sites import Sites

logger = logging.getLogger(__name__)
LOGITS, CURVE = "logits.safetensors", "curve.json"


@dataclass(frozen=True)
class MaskProblem:
    """What masks are learned for.

    Args:
        pipe: a stock pipeline, unchanged by the training.
        sites: of its denoiser, all of them.
        masked: names of those that get a mask.
        shares: site name -> what one of its units costs, as a share of the dense model (`unit_shares`).
        keep: share of the dense model that is to stay.
        whole: share that is there before.
        prompts: text or class labels; None for an unconditional pipeline.
        options: keyword arguments of the pipeline's call.
        select: logits -> kept units by site, the plan that they stand for; what validation looks at.
    """

    pipe: Any = field(repr=False)
    sites: Sites = field(repr=False)
    masked: tuple[str, ...]
    shares: Mapping[str, float] = field(repr=False)
    keep: float
    whole: float
    prompts: tuple | None
    options: Mapping[str, Any]
    select: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = field(repr=False)


@dataclass(frozen=True)
class TrainedMasks:
    """The outcome: raw logits of the best look (of the last step where none was taken), and the training curve."""

    logits: dict[str, Tensor] = field(repr=False)
    curve: list[dict[str, float]] = field(repr=False)
    figures: dict[str, float]


@torch.inference_mode(False)
@torch.enable_grad()
def train_masks(
    problem: MaskProblem,
    settings: MaskTraining,
    seed: int = 0,
    *,
    output_dir: str | os.PathLike | None = None,
    resume: bool = False,
    checkpointing_steps: int = 25,
    progress: bool = True,
) -> TrainedMasks:
    """Learn one logit per unit.

        minimise over l   E d(F(z_T, y), F_mask(z_T, y, M(l, u))) + price * sum_u share_u penalty(l_u)

    The first term's gradient goes through every denoising step in the memory of one; the price follows the budget
    (`BudgetController`). Every process of a `torch.distributed` group takes its own prompts; gradients are averaged,
    the noise of the masks is the same, so that n processes equal one with n times the batch.

    Args:
        output_dir: gets `checkpoint-*`, `logits.safetensors` and `curve.json`; None: nothing is written.
        resume: go on from the newest checkpoint there, to the bit as without the interruption; from the start where
            there is none yet.
        checkpointing_steps: optimiser steps between checkpoints.

    Raises:
        GenpruneError: loss or logits are not finite; the last checkpoint stays. Or `output_dir` has checkpoints, and
        `resume` is False. PlanMismatch: a checkpoint of another training. BadCalibrationData: no prompts.
    """
    settings.check()
    run = _Run(problem, settings, seed)
    state = Progress()
    found = checkpoints(output_dir) if output_dir is not None else []
    if found and not resume:
        raise GenpruneError(
            f"'{output_dir}' has checkpoints of an earlier training ({found[-1].name}); expected none. Pass "
            "resume=True to go on from it, or another output_dir."
        )
    if found:
        state = load_checkpoint(found[-1], run.logits, run.optimizer, run.controller, run.described)
        logger.info("going on from %s", found[-1])
    left = range(state.step, state.step if run.stops(state) else settings.train_steps)
    with run.gates:
        for step in _bar(left, state, progress and run.rank == 0):
            state.curve.append({"step": step + 1, **run.step(step)})
            state.step = step + 1
            if run.look_due(state.step):
                run.look(state)
            stop = run.stops(state)
            last = stop or state.step == settings.train_steps
            if output_dir is not None and run.rank == 0 and (last or state.step % checkpointing_steps == 0):
                save_checkpoint(output_dir, run.logits, run.optimizer, run.controller, state, run.described)
            if stop:
                logger.info("stopped at step %d: %d looks without a better one", state.step, state.worse)
                break
    logits = state.best or run.logits.detached()
    figures = {"steps": state.step, "expected_share": state.curve[-1]["expected_share"]} if state.curve else {}
    if state.best_loss is not None:
        figures |= {"validation_loss": state.best_loss, "best_step": state.best_step}
    if output_dir is not None and run.rank == 0:
        MaskLogits(logits).save(Path(output_dir) / LOGITS, run.described)
        with whole_file(Path(output_dir) / CURVE) as written:
            written.write_text(json.dumps(state.curve, indent=1) + "\n")
    return TrainedMasks(logits, state.curve, figures)


def _bar(steps: range, state: Progress, shown: bool):
    from tqdm.auto import tqdm

    bar = tqdm(steps, initial=steps.start, total=steps.stop, desc="masks", unit="step", disable=not shown)
    for step in bar:
        if state.curve:
            record = state.curve[-1]
            bar.set_postfix(loss=f"{record['loss']:.3g}", left=f"{record['expected_share']:.3f}")
        yield step


class _Run:
    """One training in progress."""

    def __init__(self, problem: MaskProblem, settings: MaskTraining, seed: int) -> None:
        self.problem, self.settings, self.seed = problem, settings, seed
        self.rank, world = process_rank()
        model = denoiser(problem.pipe)
        self.device = next(model.parameters()).device
        sites = Sites.of(problem.sites.host, [problem.sites[name] for name in problem.masked])
        self.logits = MaskLogits.filled(sites, settings.init, self.device)
        self.gates = LearnedGates(model, problem.sites, self.logits, settings.relaxation, seed)
        start = self._share(sharpness=0.0)
        self.controller = BudgetController(problem.keep, start, settings.train_steps, settings.anneal)
        rates = settings.rates()
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [values], "lr": rates.get(problem.sites[name].kind, settings.learning_rate)}
                for name, values in self.logits.items()
            ],
            weight_decay=settings.weight_decay,
            # a unit's gradient is a small part of a loss: among many units, smaller than torch's default of 1e-8
            eps=1e-15,
        )
        # the last prompts are for looking at the plan, where there are enough to spare some
        prompts, held = problem.prompts, settings.validation_prompts if settings.validate_every else 0
        spare = prompts is not None and len(prompts) >= 4 * held
        self.batches = PromptBatches(
            prompts[: len(prompts) - held] if spare and held else prompts, settings, seed, self.rank, world
        )
        options = {"num_inference_steps": settings.denoising_steps, **problem.options}
        self.dense = DenseLatents(problem.pipe, options)
        self.looker = PlanLook(problem, self.dense, settings, held, seed) if held else None
        self.loss = OBJECTIVES[settings.objective]
        self.described = {
            **asdict(settings),
            "seed": seed,
            "keep": problem.keep,
            "prompts": list(prompts) if prompts is not None else None,
            "options": {name: repr(value) for name, value in options.items()},
        }

    def step(self, step: int) -> dict[str, float]:
        """One optimiser step; what the curve says of it."""
        loss, gradients = self._loss_gradients(step)
        penalties = self._penalty_gradients()
        if self.controller.base is None:
            self.controller.begin(gradients, penalties)
        for parameter, gradient, penalty in zip(self.logits.parameters(), gradients, penalties):
            parameter.grad = gradient + self.controller.price * penalty
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        check_finite(self.logits, step + 1)
        price, share = self.controller.price, self._share(self.controller.progress(step))
        self.controller.update(step, share)
        return {"loss": loss, "expected_share": share, "target_share": self.controller.target(step), "price": price}

    def _loss_gradients(self, step: int) -> tuple[float, list[Tensor]]:
        """Mean loss and its gradient by each site's logits, over all trajectories and processes."""
        micro_batches = self.settings.gradient_accumulation_steps
        loss, total = 0.0, [torch.zeros_like(values) for values in self.logits.parameters()]
        for micro_batch in range(micro_batches):
            self.gates.draw = step * micro_batches + micro_batch
            batch = self.batches.batch(step, micro_batch)
            part = self.loss(self.problem.pipe, self.gates, self.dense, batch, self.settings) / micro_batches
            if not torch.isfinite(part):
                raise GenpruneError(
                    f"the loss of step {step + 1} is {float(part)}; expected a finite one. Lower learning_rate or "
                    "guidance_scale, or run the model in bfloat16 or float32 instead of float16."
                )
            gradients = torch.autograd.grad(part, self.logits.parameters(), allow_unused=True)
            for sum_, gradient in zip(total, gradients):
                if gradient is not None:
                    sum_ += gradient
            loss += float(part.detach())
        values = summed([torch.tensor([loss], device=self.device), *total])
        return float(values[0]), values[1:]

    def _penalty_gradients(self) -> list[Tensor]:
        penalty = PENALTIES[self.settings.penalty]
        total = sum(
            self.problem.shares[name] * penalty(values, self.settings.relaxation).sum()
            for name, values in self.logits.items()
        )
        return list(torch.autograd.grad(total, self.logits.parameters()))

    @torch.no_grad()
    def _share(self, sharpness: float) -> float:
        problem, relaxation = self.problem, self.settings.relaxation
        return float(expected_share(self.logits, relaxation, problem.sites, problem.shares, problem.whole, sharpness))

    def look_due(self, done: int) -> bool:
        """Whether it is time to look at the plan: regularly, and at the end."""
        every = self.settings.validate_every
        return self.looker is not None and (done % every == 0 or done == self.settings.train_steps)

    def stops(self, state: Progress) -> bool:
        """Whether the last looks were all without a better one."""
        return self.settings.patience is not None and state.worse >= self.settings.patience

    def look(self, state: Progress) -> None:
        """Compare the plan that would come out now with the dense pipeline; remember the best."""
        try:
            # the same on all processes, or one would stop while the others wait for it
            loss = averaged(self.looker.loss(self.logits.detached(), self.gates), self.device)
        except BudgetUnreachable as error:  # coarse units: this ranking meets the budget nowhere, a later one may
            logger.warning("no look after step %d: %s", state.step, error)
            return
        state.curve[-1]["validation_loss"] = loss
        if state.best_loss is None or loss < state.best_loss:
            state.best, state.best_loss, state.best_step = self.logits.detached(), loss, state.step
            state.worse = 0
        elif state.step >= self.settings.anneal * self.settings.train_steps:
            state.worse += 1
