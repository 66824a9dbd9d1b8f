"""`APTP`: how a prompt router is trained, as one frozen, serialisable value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from genprune.errors import GenpruneError, PlanMismatch, nearest
from genprune.methods.base import check_range, check_whole
from genprune.routers.losses import RESOURCE_LOSSES
from genprune.routers.resources import QUANTITIES

FORMAT_VERSION = 1
_CHOICES = {
    "of": (*QUANTITIES, "latency"),
    "route_by": ("prompt", "timestep"),
    "resource_loss": RESOURCE_LOSSES,
    "mixed_precision": ("no", "fp16", "bf16"),
    "grouping": ("neighbours", "magnitude"),
}
_WEIGHTS = (
    "denoising_weight",
    "resource_weight",
    "contrastive_weight",
    "output_weight",
    "block_weight",
    "spread_weight",
    "largest_weight",
    "commitment_weight",
)


@dataclass(frozen=True)
class APTP:
    """Adaptive prompt-tailored pruning: K codes of one frozen denoiser, and a predictor that routes prompts to them.

        L = denoising_weight L_ddpm + resource_weight |log(mean r / p')| + contrastive_weight L_cont
            + output_weight |t - s|^2 + block_weight mean_l |f_l^T - f_l^S|^2 / |f_l^T|^2
            - spread_weight std(r) + largest_weight (1 - max r) + commitment_weight (1 - cos(e, a))

    with r the kept share of what can go. Codes learn from every term but the contrastive one, the predictor after the
    warm-up from the contrastive one, and from the commitment where that has a weight.

    Args:
        experts: K, how many codes. 1 is a static plan, trained the same way.
        keep: share of the dense denoiser that stays on average over the training prompts, in (0, 1].
        of: `macs`, `params`, or `latency`: the time that modules were measured to take, shared out over their units.
        route_by: `prompt`, or `timestep`: one code for each interval of noise levels, the same for all prompts.
        kinds: kinds of sites that narrow; None: all that the model has.
        depth: True: parts that can go as a whole have ordered depth gates; patterns of site names; False: none.
        groups: most entries of one site's code, whose units go together.
        grouping: which units are together without scores: `neighbours` (APTP), or those of like `magnitude`.
        start_scale: how far from the threshold logits begin, where scores say what to begin around.
        predictor_scale: spread of the first predicted logits around the start, > 0. None: 1, as published, and .3
            where scores say what to begin around, so that prompts begin near that plan.
        temperature, offset: T > 0 and b of the relaxation.
        steps: optimiser steps. Published: 5000.
        warmup: share of the steps before the codes: every prompt has the architecture that was predicted for it. At
            its end the codes begin at the means of clusters of predictions.
        batch_size: rows a process and step. Balance and contrast are over the rows of all processes.
        learning_rate: of AdamW, for codes. Published: 2e-4 sqrt(rows of a step), for the predictor as well.
        predictor_learning_rate: None: learning_rate over the width of the embeddings, so that a prompt's architecture
            moves no faster than a code; at the published rate codes begin where hardly anything is left of a model.
        lr_warmup_steps: of linear warm-up, then constant.
        weight_decay, max_grad_norm: of AdamW, and of the gradients, clipped for codes and predictor apart.
        denoising_weight, resource_weight, contrastive_weight, output_weight, block_weight, spread_weight,
            largest_weight, commitment_weight: >= 0. Published: 1, 2, 100, .2, .2, .1, .1, 0; the release's block term
            is a plain squared error, in which blocks of large values dwarf the rest.
        resource_loss: `log`, `absolute` or `squared`.
        contrastive_temperature: tau > 0.
        sinkhorn_epsilon, sinkhorn_iterations: of the balanced assignment in training.
        min_snr_gamma: of the weights of `L_ddpm` and the output term, > 0; None: 5 for a diffusion scheduler. Flow
            matching has logit-normal timesteps instead, and refuses a number.
        prompt_dropout: share of rows that see the negative condition, in [0, 1).
        samples, teacher_steps, teacher_guidance: of the latents that the pipeline draws where no data are given.
        mixed_precision, gradient_checkpointing: of the frozen denoiser's passes.
        seed: of every random draw.

    Reference:
        APTP (Ganjdanesh et al., arXiv 2406.12042), sections 3 and 4.
    """

    experts: int = 8
    keep: float = 0.7
    of: str = "macs"
    route_by: str = "prompt"
    kinds: tuple[str, ...] | None = None
    depth: bool | tuple[str, ...] = True
    groups: int = 32
    grouping: str = "neighbours"
    start_scale: float = 1.0
    predictor_scale: float | None = None
    temperature: float = 0.4
    offset: float = 3.0
    steps: int = 5000
    warmup: float = 0.1
    batch_size: int = 32
    learning_rate: float = 2e-3
    predictor_learning_rate: float | None = None
    lr_warmup_steps: int = 100
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    denoising_weight: float = 1.0
    resource_weight: float = 2.0
    contrastive_weight: float = 100.0
    output_weight: float = 0.2
    block_weight: float = 0.2
    spread_weight: float = 0.1
    largest_weight: float = 0.1
    commitment_weight: float = 0.0
    resource_loss: str = "log"
    contrastive_temperature: float = 0.03
    sinkhorn_epsilon: float = 0.05
    sinkhorn_iterations: int = 3
    min_snr_gamma: float | None = None
    prompt_dropout: float = 0.0
    samples: int | None = None
    teacher_steps: int = 25
    teacher_guidance: float | None = None
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    seed: int = 0

    name: ClassVar[str] = "aptp"

    def __post_init__(self) -> None:
        for name in ("kinds", "depth"):
            value = getattr(self, name)
            if isinstance(value, (str, list, tuple)):
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                near = nearest(str(value), choices)
                raise GenpruneError(f"{name}={value!r}{near}; expected one of {', '.join(choices)}. Pass one of them.")
        for name in ("experts", "groups", "steps", "batch_size", "sinkhorn_iterations", "teacher_steps"):
            check_whole(name, getattr(self, name), 1)
        for name in ("lr_warmup_steps", "seed"):
            check_whole(name, getattr(self, name), 0)
        if self.samples is not None:
            check_whole("samples", self.samples, 1)
        self._check_numbers()

    def _check_numbers(self) -> None:
        for name in (*_WEIGHTS, "weight_decay", "start_scale", "offset"):
            check_range(name, getattr(self, name), 0, math.inf)
        for name in ("temperature", "learning_rate", "max_grad_norm", "contrastive_temperature", "sinkhorn_epsilon"):
            check_range(name, getattr(self, name), 1e-12, math.inf)
        check_range("keep", self.keep, 1e-6, 1)
        for name in ("warmup", "prompt_dropout"):
            check_range(name, getattr(self, name), 0, 0.999)
        if self.min_snr_gamma is not None:
            check_range("min_snr_gamma", self.min_snr_gamma, 1e-12, math.inf)
        for name in ("predictor_scale", "predictor_learning_rate"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 1e-12, math.inf)
        if self.teacher_guidance is not None:
            check_range("teacher_guidance", self.teacher_guidance, 0, math.inf)

    @property
    def warmup_steps(self) -> int:
        """Steps before the codes; none where there is one code, or where noise levels choose."""
        return int(self.warmup * self.steps) if self.experts > 1 and self.route_by == "prompt" else 0

    def warmed(self, rate: float, step: int) -> float:
        """A learning rate in step number `step`, from 0."""
        return rate * min(1.0, (step + 1) / max(1, self.lr_warmup_steps))

    def changed(self, **changes: Any) -> APTP:
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
        """Plain JSON data; `APTP.from_json` reads it."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {"format_version": FORMAT_VERSION, "method": self.name, **values}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> APTP:
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
