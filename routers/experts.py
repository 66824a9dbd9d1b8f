"""What a router chooses among, and what it answers: `Expert` and `Routes`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from genprune.errors import GenpruneError, PlanMismatch
from genprune.plan import PruningPlan


@dataclass(frozen=True)
class Expert:
    """One sub-network of the denoiser: a plan, and what fine-tuning left for it.

    Args:
        plan: what stays of the dense model.
        usage: share of the training prompts that are routed here, in [0, 1].
        lora: `pytorch_lora_weights.safetensors` of a fine-tuned expert, for the cut model.
        weights: safetensors file, parameter name of the CUT model -> fine-tuned tensor, those that changed alone.

    Raises:
        GenpruneError: `usage` is no share.
    """

    plan: PruningPlan
    usage: float = 0.0
    lora: Path | None = None
    weights: Path | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.usage, (int, float)) and not isinstance(self.usage, bool)
        if not number or not math.isfinite(self.usage) or not 0 <= self.usage <= 1:
            raise GenpruneError(
                f"the usage of an expert is {self.usage!r}; expected the share of the training prompts that are "
                "routed to it. Pass a number in [0, 1]."
            )
        object.__setattr__(self, "usage", float(self.usage))
        for name in ("lora", "weights"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(path))

    @property
    def share(self) -> float:
        """MACs of the whole denoiser that this expert keeps, as a share of the dense model's.

        Raises:
            PlanMismatch: the plan's figures do not say it.
        """
        figures = self.plan.figures
        if not {"macs", "dense_macs"} <= figures.keys() or not figures["dense_macs"] > 0:
            raise PlanMismatch(
                f"the plan of an expert has the figures {sorted(figures)}; expected 'macs' and 'dense_macs', which "
                "say what it costs. Make the plan with gp.make_plan or by training a router, which count both."
            )
        return figures["macs"] / figures["dense_macs"]


@dataclass(frozen=True)
class Routes:
    """Where a list of prompts goes.

    Args:
        experts: the expert of each prompt, in the order given.
        similarities: S_ik = cos(phi(e_i), phi(a_k)), float64 of shape `(prompts, K)`, in [-1, 1].
        unfamiliar: for each prompt why it is unlike the training prompts, or None where it is not.
    """

    experts: tuple[int, ...]
    similarities: Tensor
    unfamiliar: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.experts)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Routes)
            and self.experts == other.experts
            and self.unfamiliar == other.unfamiliar
            and torch.equal(self.similarities, other.similarities)
        )

    __hash__ = None

    def groups(self) -> dict[int, list[int]]:
        """Expert -> the indices of its prompts in the order given; experts ascending, those without prompts absent."""
        found: dict[int, list[int]] = {expert: [] for expert in sorted(set(self.experts))}
        for index, expert in enumerate(self.experts):
            found[expert].append(index)
        return found
