"""Methods that need no data: random units, and units of small weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from genprune.criteria import criterion_named
from genprune.methods.base import UnitMethod


@dataclass(frozen=True)
class Random(UnitMethod):
    """Random units under the budget; the baseline that every method has to beat."""

    name: ClassVar[str] = "random"

    def criterion(self):
        return criterion_named(self.name)(seed=self.seed)


@dataclass(frozen=True)
class Magnitude(UnitMethod):
    """Units of small weights go, each layer relative to itself; needs no data."""

    name: ClassVar[str] = "magnitude"
