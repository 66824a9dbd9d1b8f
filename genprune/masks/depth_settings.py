"""How depth is learned: everything but the budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

from genprune.errors import GenpruneError


@dataclass(frozen=True)
class DepthTraining:
    """Settings of one training of layer choices.

    Args:
        train_steps: optimiser steps, >= 1. Nothing is skipped while searching: a step costs a forward and a backward
            pass of the whole model, and a forward pass more with `distillation`.
        gradient_accumulation_steps: batches of one optimiser step, >= 1; each has other draws.
        batch_size: rows of a batch that a pipeline draws, >= 1; a user's own batches stay as they are.
        timesteps: how many, drawn at random from the training range of a pipeline; each picture is noised to each.
        samples: pictures that a pipeline draws to train on; None: one per prompt, 16 without prompts.
        steps: denoising steps of the runs that draw them, >= 1.
        guidance_scale: of those runs; None: the pipeline's default. The training sees the rows with a prompt alone.
        learning_rate: of AdamW on the logits.
        logit_init, logit_scale: every logit at the start, and what logits are multiplied by in the softmax.
        temperatures: of the softmax in the first and the last step, linear in between; both above 0.
        ema_decay: of the running mean of the logits that decides, in [0, 1); smaller in the first steps, where the
            mean would be the start.
        max_grad_norm: of all gradients together, > 0.
        lora_rank: of the low-rank updates trained beside the logits, so that a choice is judged by what training makes
            of it; 0: none. They are gone afterwards.
        lora_alpha, lora_learning_rate: of those.
        distillation: weight of the distance from the output of the whole model without updates, squared over its
            squared norm, row by row; the task's own loss has weight 1. 0: none.

    Reference:
        TinyFusion (arXiv 2412.01199): logits start at .02 and are scaled by 1e2, tau 4 -> .1, AdamW without decay at
        1e-3 (gates) and 1e-4 (LoRA, rank 8, alpha 16), clipping at 1, mean .999; its task loss alone.
    """

    train_steps: int = 500
    gradient_accumulation_steps: int = 1
    batch_size: int = 4
    timesteps: int = 32
    samples: int | None = None
    steps: int = 20
    guidance_scale: float | None = None
    learning_rate: float = 1e-3
    logit_init: float = 0.02
    logit_scale: float = 100.0
    temperatures: tuple[float, float] = (4.0, 0.1)
    ema_decay: float = 0.999
    max_grad_norm: float = 1.0
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_learning_rate: float = 1e-4
    distillation: float = 1.0

    def check(self) -> None:
        """Raises `GenpruneError` for a value out of range."""
        whole = {"train_steps": 1, "gradient_accumulation_steps": 1, "batch_size": 1, "timesteps": 1, "steps": 1}
        for name, least in {**whole, "lora_rank": 0, **({} if self.samples is None else {"samples": 1})}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise GenpruneError(f"{name}={value!r}; expected a whole number of at least {least}.")
        for name in ("learning_rate", "lora_learning_rate", "logit_scale", "max_grad_norm", "lora_alpha"):
            value = getattr(self, name)
            if not _is_number(value) or value <= 0:
                raise GenpruneError(f"{name}={value!r}; expected a number above 0.")
        for name in ("distillation", *(() if self.guidance_scale is None else ("guidance_scale",))):
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                raise GenpruneError(f"{name}={value!r}; expected a number of at least 0.")
        if not _is_number(self.logit_init):
            raise GenpruneError(f"logit_init={self.logit_init!r}; expected a finite number, such as 0.02.")
        if not _is_number(self.ema_decay) or not 0 <= self.ema_decay < 1:
            raise GenpruneError(f"ema_decay={self.ema_decay!r}; expected a number in [0, 1), such as 0.999.")
        ends = self.temperatures
        if not isinstance(ends, tuple) or len(ends) != 2 or not all(_is_number(end) and end > 0 for end in ends):
            raise GenpruneError(
                f"temperatures={ends!r}; expected two numbers above 0, of the first and the last step, as (4.0, 0.1)."
            )

    def temperature(self, step: int) -> float:
        """tau of optimiser step `step`, from 0."""
        first, last = self.temperatures
        return first + (last - first) * step / max(1, self.train_steps - 1)

    def decay(self, step: int) -> float:
        """How much of the running mean stays at optimiser step `step`, from 0."""
        return min(self.ema_decay, (1 + step) / (10 + step))


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
