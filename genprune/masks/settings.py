"""How masks are learned: everything but the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from genprune.errors import GenpruneError, nearest
from genprune.masks.hard_concrete import HardConcrete
from genprune.masks.penalties import check_penalty
from genprune.sites import KINDS

LOSSES = ("rel_l2", "rel_norm", "mse", "l1")
OBJECTIVES = ("trajectory", "chain", "per_step")


@dataclass(frozen=True)
class MaskTraining:
    """Settings of one training of masks.

    Args:
        train_steps: optimiser steps, >= 1.
        batch_size: prompts of one trajectory and process, >= 1; each has noise of its own.
        gradient_accumulation_steps: trajectories of one optimiser step, >= 1; each has its own draw of the masks.
        learning_rate: of AdamW on the logits, in logits per step.
        learning_rates: (kind, learning rate) pairs that replace it for kinds of sites.
        weight_decay: of the logits; 0, because decay pulls negative logits back up.
        init: every logit at the start. At or above the dead zone of `HardConcrete` only the penalty moves logits.
        temperature, damping: of the hard concrete, see `HardConcrete`.
        penalty: `smooth_l0`, `expected_l0`, or the published `absolute` and `flat_sigmoid`; weighted by unit costs.
        anneal: share of the steps over which the expected cost is brought down to the budget, in (0, 1].
        objective: `trajectory` compares final latents after the whole denoising chain, `chain` the latents after
            every step of it, both with gradients through all steps; `per_step` (an ablation)
            compares the denoiser's outputs on the dense model's own inputs, one random call of each trajectory.
        loss: `rel_l2` (squared distance over squared norm, row by row), its root `rel_norm`, `mse` or `l1`.
        denoising_steps: of every trajectory, >= 1.
        guidance_scale: None: the pipeline's default; a number; or (low, high), drawn anew for each trajectory.
        noises_per_prompt: different starting noises of a prompt; its dense targets are kept. None: always new ones.
        validate_every: optimiser steps between two looks at the plan that would come out now; 0: never.
        validation_prompts: how many prompts, from the end of the list, are kept for that.
        patience: looks without a better one until the training stops, counted once the budget is reached; None: never.
        activation_memory: see `genprune.denoising.draw_latents`.
        block_checkpointing: see there.
    """

    train_steps: int = 200
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    learning_rate: float = 0.1
    learning_rates: tuple[tuple[str, float], ...] = ()
    weight_decay: float = 0.0
    init: float = 2.0
    temperature: float = 0.83
    damping: float = 0.5
    penalty: str = "smooth_l0"
    anneal: float = 0.6
    objective: str = "trajectory"
    loss: str = "rel_l2"
    denoising_steps: int = 20
    guidance_scale: float | tuple[float, float] | None = None
    noises_per_prompt: int | None = 4
    validate_every: int = 25
    validation_prompts: int = 4
    patience: int | None = None
    activation_memory: int | str | None = "one call"
    block_checkpointing: bool = False

    def check(self) -> None:
        """Raises `GenpruneError` for a value out of range."""
        whole = {
            "train_steps": 1,
            "batch_size": 1,
            "gradient_accumulation_steps": 1,
            "denoising_steps": 1,
            "noises_per_prompt": 1,
            "validate_every": 0,
            "validation_prompts": 0,
            "patience": 1,
        }
        for name, least in whole.items():
            value = getattr(self, name)
            optional = name in ("noises_per_prompt", "patience") and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise GenpruneError(f"{name}={value!r}; expected a whole number of at least {least}.")
        for name, value in {"learning_rate": self.learning_rate, **self.rates()}.items():
            if not _is_number(value) or not value > 0:
                raise GenpruneError(f"the learning rate {name} is {value!r}; expected a number above 0, such as 0.1.")
        for kind in self.rates():
            if kind not in KINDS:
                raise GenpruneError(f"learning_rates names '{kind}'{nearest(kind, KINDS)}; expected kinds of {KINDS}.")
        for name in ("init", "weight_decay", "anneal", "temperature", "damping"):
            if not _is_number(getattr(self, name)):
                raise GenpruneError(f"{name}={getattr(self, name)!r}; expected a finite number.")
        if self.weight_decay < 0:
            raise GenpruneError(f"weight_decay={self.weight_decay!r}; expected a number of at least 0. Pass 0.")
        if not 0 < self.anneal <= 1:
            raise GenpruneError(f"anneal={self.anneal!r}; expected a share of the steps in (0, 1].")
        for name, value, known in (("loss", self.loss, LOSSES), ("objective", self.objective, OBJECTIVES)):
            if value not in known:
                raise GenpruneError(
                    f"{name}={value!r}{nearest(str(value), known)}; expected one of {', '.join(known)}."
                )
        guidance = self.guidance_scale
        if guidance is not None:
            ends = guidance if isinstance(guidance, tuple) else (guidance, guidance)
            if len(ends) != 2 or not all(map(_is_number, ends)) or not 0 <= ends[0] <= ends[1]:
                raise GenpruneError(
                    f"guidance_scale={guidance!r}; expected a number of at least 0, or (low, high) with 0 <= low <= "
                    "high."
                )
        check_penalty(self.penalty)
        self.relaxation  # noqa: B018  checks its own ranges

    def rates(self) -> dict[str, float]:
        """Kind -> its learning rate, where it differs."""
        return dict(self.learning_rates)

    @property
    def relaxation(self) -> HardConcrete:
        return HardConcrete(self.temperature, self.damping)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def as_pairs(rates: Mapping[str, float] | tuple) -> tuple[tuple[str, float], ...]:
    """Learning rates by kind as sorted pairs, from a dictionary or pairs. Raises `GenpruneError`."""
    try:
        items = rates.items() if isinstance(rates, Mapping) else rates
        return tuple(sorted((str(kind), float(rate)) for kind, rate in items))
    except (TypeError, ValueError):
        raise GenpruneError(
            f'learning_rates={rates!r}; expected pairs of a kind and a number, such as (("neurons", 0.1),).'
        ) from None
