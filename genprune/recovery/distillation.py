"""`NormalizedDistillation`: how a cut model is trained against the dense one, as one frozen, serialisable value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from genprune.errors import GenpruneError, PlanMismatch, nearest

FORMAT_VERSION = 1
NORMALIZERS = ("rel_l2", "first_ref", "layernorm", "masked", "mse")
_CHOICES = {
    "normalizer": NORMALIZERS,
    "feature_reduction": ("sum", "mean"),
    "lr_scheduler": ("constant", "cosine", "linear"),
    "mixed_precision": ("no", "fp16", "bf16"),
    "timestep_sampling": ("uniform", "logit_normal"),
    "classifier_output": ("kl", "mse"),
    "pairing": ("end_of_run", "same"),
}
_WHOLE = {
    "steps": 1,
    "batch_size": 1,
    "gradient_accumulation": 1,
    "warmup_steps": 0,
    "teacher_steps": 1,
    "divergence_patience": 1,
    "seed": 0,
}


@dataclass(frozen=True)
class NormalizedDistillation:
    """Recovery by distillation from the dense model, every feature term on one scale.

        L = task_weight |y - s|^2 + output_weight |t - s|^2 + feature_weight sum_l a_l |f_l^T - f_l^S|^2

    with the target y, the predictions t and s of teacher and student, their features f_l at tap l, all means over
    elements, and a_l by `normalizer`. A classifier has cross-entropy and the distance of logits in place of the first
    two.

    Args:
        steps: optimiser steps of the whole run, also after a resume.
        batch_size: rows a process and micro-batch.
        gradient_accumulation: micro-batches a step.
        learning_rate: of AdamW. BK-SDM trains with 5e-5 at 256 rows a step.
        lr_scheduler: `constant`, `cosine` or `linear` (both to 0), after `warmup_steps` of linear warm-up.
        weight_decay, betas, max_grad_norm: of AdamW, and of the clipped gradient.
        task_weight, output_weight, feature_weight: >= 0, not all 0. 1 each, as BK-SDM has them.
        normalizer: a_l. `rel_l2`: 1 / mean |f_l^T|^2, a running mean, so that each tap is a relative error.
            `first_ref`: mean |f_1^T|^2 / mean |f_l^T|^2, which keeps the scale of the first tap. `layernorm`: both
            sides layer-normalised over channels. `masked`: elements within 2 standard deviations of a sample's mean,
            each side with its own mask (TinyFusion). `mse`: 1 (BK-SDM), in which taps of large values dwarf the rest.
        feature_reduction: `sum` over taps, or their `mean`, which weighs deep models like shallow ones.
        learned_weights: also learn a log-variance s_i for task, output and each tap: exp(-s_i) L_i + s_i.
        pairing: which feature of the teacher a surviving block takes where blocks behind it went, see
            `feature_pairs`.
        pairs: (student's module path, teacher's module path) instead of the derived pairs; None derives them.
        min_snr_gamma: weight of a row's task and output term by its timestep, min(SNR, gamma) over SNR (epsilon),
            over SNR + 1 (v) or over 1 (sample). None: 1 everywhere. Not for flow matching. 5 is usual.
        timestep_sampling: `uniform`, or `logit_normal` for flow matching (SD3).
        prompt_dropout: share of rows that see the pipeline's negative condition in place of their prompt, in [0, 1),
            as classifier-free guidance needs it.
        classifier_output: distance of logits: `kl` at `temperature` (times its square), or `mse`.
        ema_decay: of averaged weights, warmed up as (1 + step) / (10 + step); they are what the run ends with. None:
            no average.
        mixed_precision: `no`, `fp16` or `bf16`, by accelerate.
        gradient_checkpointing: switch the host's own on: less memory, about a third more time.
        lora_rank: train a LoRA of this rank on attention, feed-forward and ResNet layers and nothing else. None: all
            parameters that require gradients.
        samples: latents that the teacher draws where no data are given. None: one a prompt.
        teacher_steps, teacher_guidance: of these drawings; None leaves the pipeline's guidance.
        divergence_factor, divergence_patience: the run stops where this many steps in a row have a loss above this
            multiple of the running median.
        seed: of every random draw.

    Reference:
        LAPTOP-Diff (arXiv 2404.11098, normalised feature distillation; its exact weights are not published), BK-SDM
        (2305.15798), TinyFusion (2412.01199, masks), min-SNR (2303.09556).
    """

    name: ClassVar[str] = "normalized_distillation"

    steps: int = 1000
    batch_size: int = 4
    gradient_accumulation: int = 1
    learning_rate: float = 5e-5
    lr_scheduler: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    task_weight: float = 1.0
    output_weight: float = 1.0
    feature_weight: float = 1.0
    normalizer: str = "rel_l2"
    feature_reduction: str = "sum"
    learned_weights: bool = False
    pairing: str = "end_of_run"
    pairs: tuple[tuple[str, str], ...] | None = None
    min_snr_gamma: float | None = None
    timestep_sampling: str = "uniform"
    prompt_dropout: float = 0.0
    classifier_output: str = "kl"
    temperature: float = 1.0
    ema_decay: float | None = None
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    lora_rank: int | None = None
    samples: int | None = None
    teacher_steps: int = 25
    teacher_guidance: float | None = None
    divergence_factor: float = 10.0
    divergence_patience: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.pairs is not None:
            object.__setattr__(self, "pairs", tuple(tuple(pair) for pair in self.pairs))
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                near = nearest(str(value), choices)
                raise GenpruneError(f"{name}={value!r}{near}; expected one of {', '.join(choices)}. Pass one of them.")
        for name, low in _WHOLE.items():
            _check_whole(name, getattr(self, name), low)
        for name in ("lora_rank", "samples"):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name), 1)
        for name in ("learned_weights", "gradient_checkpointing"):
            if not isinstance(getattr(self, name), bool):
                raise GenpruneError(f"{name}={getattr(self, name)!r}; expected True or False. Pass one of them.")
        self._check_numbers()
        self._check_pairs()

    def _check_numbers(self) -> None:
        positive = ("learning_rate", "max_grad_norm", "temperature")
        for name in positive:
            _check_number(name, getattr(self, name), 0, open_low=True)
        for name in ("weight_decay", "task_weight", "output_weight", "feature_weight"):
            _check_number(name, getattr(self, name), 0)
        _check_number("divergence_factor", self.divergence_factor, 1, open_low=True)
        _check_number("prompt_dropout", self.prompt_dropout, 0, 1, open_high=True)
        if self.min_snr_gamma is not None:
            _check_number("min_snr_gamma", self.min_snr_gamma, 0, open_low=True)
        if self.ema_decay is not None:
            _check_number("ema_decay", self.ema_decay, 0, 1, open_high=True)
        if self.teacher_guidance is not None:
            _check_number("teacher_guidance", self.teacher_guidance, 0)
        if len(self.betas) != 2:
            raise GenpruneError(f"betas={self.betas!r}; expected two numbers in [0, 1). Pass e.g. (0.9, 0.999).")
        for value in self.betas:
            _check_number("betas", value, 0, 1, open_high=True)
        if not self.task_weight + self.output_weight + self.feature_weight > 0:
            raise GenpruneError(
                "task_weight, output_weight and feature_weight are all 0; expected one above 0. "
                "Pass e.g. output_weight=1."
            )

    def _check_pairs(self) -> None:
        for pair in self.pairs or ():
            if len(pair) != 2 or not all(isinstance(path, str) for path in pair):
                raise GenpruneError(
                    f"pairs has {pair!r}; expected (student's module path, teacher's module path). Pass e.g. "
                    'pairs=[("up_blocks.0", "up_blocks.1")].'
                )

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of optimiser step number `step`, from 0: a function of the step, so nothing to save."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        shape = {
            "constant": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        }[self.lr_scheduler]
        return self.learning_rate * shape

    def changed(self, **changes: Any) -> NormalizedDistillation:
        """A copy with other values. Raises `GenpruneError` for an unknown name or a value out of range."""
        self._check_names(changes)
        return dataclasses.replace(self, **changes)

    @classmethod
    def _check_names(cls, given: Mapping[str, Any]) -> None:
        known = [each.name for each in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                raise GenpruneError(
                    f"{cls.__name__} has no '{name}'{nearest(name, known)}; expected {', '.join(known)}."
                )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; `NormalizedDistillation.from_json` reads it."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        values["betas"] = list(self.betas)
        values["pairs"] = None if self.pairs is None else [list(pair) for pair in self.pairs]
        return {"format_version": FORMAT_VERSION, "method": self.name, **values}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> NormalizedDistillation:
        """Read what `to_json` gave. Raises `PlanMismatch` for another method or a newer format."""
        values = dict(data)
        version, method = values.pop("format_version", None), values.pop("method", None)
        if method != cls.name:
            raise PlanMismatch(f"this is of method {method!r}; expected '{cls.name}'. Pass what its to_json gave.")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise PlanMismatch(
                f"format_version={version!r}; this genprune reads up to {FORMAT_VERSION}. Upgrade with "
                "`pip install -U genprune`."
            )
        cls._check_names(values)
        return cls(**values)


def _check_whole(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise GenpruneError(f"{name}={value!r}; expected a whole number of at least {low}. Pass one.")


def _check_number(
    name: str, value: Any, low: float, high: float = math.inf, open_low: bool = False, open_high: bool = False
) -> None:
    is_number = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    if not is_number or value < low or value > high or (open_low and value == low) or (open_high and value == high):
        bounds = f"{'above' if open_low else 'at least'} {low}"
        if high < math.inf:
            bounds += f" and {'below' if open_high else 'at most'} {high}"
        raise GenpruneError(f"{name}={value!r}; expected a number {bounds}. Pass one.")
