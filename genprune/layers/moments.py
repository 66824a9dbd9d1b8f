"""Moments of what a module is given and returns, streamed in float64: all that a closed-form fit needs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from genprune.denoising.activations import Moments
from genprune.recovery.least_squares import Residual


@dataclass
class PairMoments:
    """Weighted means over positions of inputs x `(in,)` and outputs y `(out,)`: `E[x x^T]`, `E[y x^T]`, means."""

    inputs: Moments
    cross_sum: Tensor = field(repr=False)
    output_sum: Tensor = field(repr=False)
    energy_sum: Tensor = field(repr=False)

    @classmethod
    def zeros(cls, wide: int, out: int, device: torch.device | str) -> PairMoments:
        make = {"dtype": torch.float64, "device": device}
        sums = torch.zeros(out, wide, **make), torch.zeros(out, **make), torch.zeros((), **make)
        return cls(Moments.zeros(wide, device), *sums)

    @staticmethod
    def size(wide: int, out: int) -> int:
        """Bytes of one."""
        return 8 * wide * (wide + out)

    def add(self, inputs: Tensor, outputs: Tensor, weight: float) -> None:
        """Add positions `(n, in)` and `(n, out)`, float32 or wider."""
        self.inputs.add(inputs, weight)
        self.cross_sum += (outputs.T @ inputs).double() * weight
        self.output_sum += outputs.sum(0, dtype=torch.float64) * weight
        self.energy_sum += outputs.square().sum(dtype=torch.float64) * weight

    @property
    def positions(self) -> int:
        return self.inputs.positions

    @property
    def second(self) -> Tensor:
        """`E[x x^T]`, shape `(in, in)`."""
        return self.inputs.second

    def is_finite(self) -> bool:
        sums = (self.inputs.second_sum, self.cross_sum, self.energy_sum)
        return all(bool(torch.isfinite(total).all()) for total in sums)

    def residual(self) -> Residual:
        """The problem of mapping x to y, from a map that is zero."""
        total = self.inputs.weight
        return Residual(
            second=self.inputs.second,
            cross=self.cross_sum / total,
            mean=self.inputs.mean,
            lack=self.output_sum / total,
            energy=float(self.energy_sum / total),
        )


@dataclass
class ChannelMoments:
    """The same for each channel on its own: `second`, `cross`, `mean` and `lack` have shape `(channels,)`."""

    sums: Tensor = field(repr=False)  # (4, channels): x^2, y x, x, y
    weight: float = 0.0
    positions: int = 0

    @classmethod
    def zeros(cls, wide: int, out: int, device: torch.device | str) -> ChannelMoments:
        return cls(torch.zeros(4, wide, dtype=torch.float64, device=device))

    @staticmethod
    def size(wide: int, out: int) -> int:
        """Bytes of one."""
        return 8 * 4 * wide

    def add(self, inputs: Tensor, outputs: Tensor, weight: float) -> None:
        """Add positions `(n, channels)` of both, float32 or wider."""
        values = (inputs.double().square(), outputs.double() * inputs, inputs, outputs)
        self.sums += torch.stack([value.sum(0, dtype=torch.float64) for value in values]) * weight
        self.weight += weight * len(inputs)
        self.positions += len(inputs)

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.sums).all())

    @property
    def second(self) -> Tensor:
        """`E[x_c^2]`."""
        return self.sums[0] / self.weight

    @property
    def cross(self) -> Tensor:
        """`E[y_c x_c]`."""
        return self.sums[1] / self.weight

    @property
    def mean(self) -> Tensor:
        """`E[x_c]`."""
        return self.sums[2] / self.weight

    @property
    def lack(self) -> Tensor:
        """`E[y_c]`."""
        return self.sums[3] / self.weight
