"""The hard concrete relaxation of a 0/1 mask, with EcoDiff's damped noise. Pure functions of tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from genprune.errors import GenpruneError


@dataclass(frozen=True)
class HardConcrete:
    """A gate in [0, 1] for each logit and each draw of uniform noise, with mass at exactly 0 and exactly 1.

        s = sigmoid((log(u + d) - log(1 - u + d) + l) / a),    M = clamp(s (z - g) + g, 0, 1),    u ~ U(0, 1)

    Args:
        temperature: `a` > 0; small is closer to 0/1.
        damping: `d` > 0. It is no numerical guard: the noise stays within +-log((1 + d) / d), which is 2.40, 1.10 and
            0.69 for 0.1, 0.5 and 1. Gates are constant, and their gradients zero, outside of `dead_zone`.
        low, high: `g` < 0 and `z` > 1, the stretch that puts mass on 0 and 1.

    Reference:
        Louizos et al., arXiv 1712.01312, eq. 10-11; damped noise: EcoDiff (arXiv 2412.02852).
    """

    temperature: float = 0.83
    damping: float = 0.5
    low: float = -0.1
    high: float = 1.1

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and self.damping > 0 and self.low < 0 and self.high > 1):
            raise GenpruneError(
                f"temperature={self.temperature}, damping={self.damping}, low={self.low}, high={self.high}; expected "
                "temperature > 0, damping > 0, low < 0 and high > 1."
            )

    @property
    def dead_zone(self) -> float:
        """Logits of at least this size give a constant gate: 1 above it, 0 below its negative."""
        noise = math.log((1 + self.damping) / self.damping)
        return noise + self.temperature * math.log((1 - self.low) / (self.high - 1))

    def gate(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """`M`, of the shape of `logits`. `uniform` has that shape, in [0, 1)."""
        noise = torch.log(uniform + self.damping) - torch.log(1 - uniform + self.damping)
        return self._stretched(torch.sigmoid((noise + logits) / self.temperature))

    def expected_gate(self, logits: Tensor, points: int = 64) -> Tensor:
        """`E[M]` over the noise, of the shape of `logits`, by the midpoint rule with this many points."""
        uniform = (torch.arange(points, device=logits.device, dtype=logits.dtype) + 0.5) / points
        return self.gate(logits[..., None], uniform).mean(-1)

    def probability(self, logits: Tensor, level: float = 0.0) -> Tensor:
        """`P(M > level)`, exact, damped noise included; `level` 0 is the expected L0 norm of one gate.

        With `p` the `smooth_probability` it is `clip((1 + 2 d) p - d, 0, 1)`. Flat where the bounded noise cannot
        reach the level; `smooth_probability` is not.
        """
        smooth = self.smooth_probability(logits, level)
        return ((1 + 2 * self.damping) * smooth - self.damping).clamp(0, 1)

    def smooth_probability(self, logits: Tensor, level: float = 0.0) -> Tensor:
        """`probability` in the limit of undamped noise: `sigmoid(l - a log(-g / z))` for level 0; nowhere flat."""
        return torch.sigmoid(logits - self.temperature * math.log((level - self.low) / (self.high - level)))

    def _stretched(self, s: Tensor) -> Tensor:
        return (s * (self.high - self.low) + self.low).clamp(0, 1)
