"""When a recovery has to stop: a term that is not finite, or a loss far above its running median for several steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

_WINDOW, _FIRST = 50, 10  # losses that the median is of, and how many it needs


@dataclass
class DivergenceGuard:
    """Watches losses, one a step.

    Args:
        factor: of the running median, > 1.
        patience: steps in a row above it that stop the run.
        losses: the latest, oldest first.
        above: steps in a row that were above.
    """

    factor: float
    patience: int
    losses: list[float] = field(default_factory=list)
    above: int = 0

    def median(self) -> float | None:
        """The running median; None while there are too few losses."""
        return statistics.median(self.losses) if len(self.losses) >= _FIRST else None

    def diverged(self, loss: float) -> bool:
        """Take in the loss of one step; whether the run has to stop."""
        median = self.median()
        if median is not None and loss > self.factor * median:
            self.above += 1  # and it does not raise the median
        else:
            self.above = 0
            self.losses = [*self.losses, loss][-_WINDOW:]
        return self.above >= self.patience

    def to_json(self) -> dict:
        return {"losses": self.losses, "above": self.above}


def first_not_finite(terms: Mapping[str, float]) -> str | None:
    """The name of the first term that is not finite."""
    return next((name for name, value in terms.items() if not math.isfinite(value)), None)
