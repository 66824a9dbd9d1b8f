"""Gates of one denoising step: a hard concrete draw for every unit, replayable from stored seeds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from genprune.gates import GateHandle, attach_gates
from genprune.masks.hard_concrete import HardConcrete
from genprune.masks.logits import MaskLogits
from genprune.sites import Sites


class LearnedGates:
    """Puts `M(l, u)` on a model's gates, with another draw `u` for every denoising step; a context manager.

    The draw of a denoising step depends on (`seed`, `draw`, step, site) alone, so a step that is recomputed in the
    backward pass sees the gates of its forward pass, and every process of a run sees the same.

    Args:
        model: the denoiser.
        sites: those that `logits` are for, of the whole model.
        logits: what is learned, on the model's device.
        relaxation: how a logit and noise become a gate.
        seed: of the run.

    Attributes:
        draw: number of the trajectory; set it before each.
    """

    def __init__(
        self, model: nn.Module, sites: Sites, logits: MaskLogits, relaxation: HardConcrete, seed: int = 0
    ) -> None:
        self.model, self.sites, self.logits, self.relaxation, self.seed = model, sites, logits, relaxation, seed
        self.draw = 0
        self._handle: GateHandle | None = None

    def parameters(self) -> list[Tensor]:
        return self.logits.parameters()

    def noise(self, step: int) -> dict[str, Tensor]:
        """Site name -> uniform noise of shape `(size,)` of one denoising step."""
        parameters = self.logits.parameters()
        generator = torch.Generator(parameters[0].device)
        generator.manual_seed(((self.seed * 1_000_003 + self.draw) * 1_000_003 + step) % 2**63)
        sizes = [len(logits) for logits in parameters]
        flat = torch.rand(sum(sizes), generator=generator, device=parameters[0].device)
        return dict(zip(self.logits, flat.split(sizes)))

    def set_step(self, step: int) -> None:
        """Set every gate for denoising step number `step`, in the grad mode in force."""
        for name, uniform in self.noise(step).items():
            self._handle[name] = self.relaxation.gate(self.logits[name], uniform)

    def open(self) -> None:
        """All gates at 1: the dense model, to the bit."""
        self.fix({})

    def fix(self, keep: Mapping[str, Tensor]) -> None:
        """0/1 gates for every step: the units that a plan keeps, all of sites that it does not name."""
        for name, logits in self.logits.items():
            mask = keep[name].to(logits.detach()) if name in keep else torch.ones_like(logits.detach())
            self._handle[name] = mask

    def __enter__(self) -> LearnedGates:
        ones = {name: torch.ones_like(logits.detach()) for name, logits in self.logits.items()}
        self._handle = attach_gates(self.model, ones, self.sites)
        return self

    def __exit__(self, *error) -> None:
        self._handle.remove()
        self._handle = None
