"""Who is compared: every method at every budget, with and without compensation, and the two controls."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .bases import Base

# (keep, of): what the issue of this comparison asks for
MAIN, HALF = (0.7, "macs"), (0.5, "macs")
BUDGETS = (MAIN, HALF, (0.85, "macs"), (0.7, "params"))
METHODS = (
    "ecodiff",
    "taylor",
    "obs",
    "magnitude",
    "random",
    "random, seed 1",
    "random, seed 2",
    "ecodiff, per-step loss",
)
COMPENSATED = ("magnitude", "taylor", "obs", "ecodiff")


@dataclass(frozen=True)
class Candidate:
    """One row.

    Attributes:
        method: name of `plans.methods`; None: the dense model with `keep` of its steps.
        compensation: `bias`, `least_squares`, `sequential` or None.
        shuffle: seed of a shuffle within layers, or None.
    """

    method: str | None
    keep: float
    of: str
    compensation: str | None = None
    shuffle: int | None = None

    @property
    def label(self) -> str:
        if self.method is None:
            return "fewer steps"
        label = self.method
        if self.shuffle is not None:
            label += f", shuffled within layers, seed {self.shuffle}"
        return label + (f" + {self.compensation.replace('_', ' ')}" if self.compensation else "")

    @property
    def budget(self) -> str:
        return f"{self.keep:g}-{self.of}"

    @property
    def slug(self) -> str:
        return f"{self.label.replace(', ', '-').replace(' ', '-')}@{self.budget}"

    def to_json(self) -> dict:
        return {"label": self.label, **asdict(self)}


def candidates(base: Base, quick: bool) -> list[Candidate]:
    """All rows of a base: the most at 70 % of MACs, where the claim is."""
    found = []
    for keep, of in (MAIN,) if quick else BUDGETS:
        main = (keep, of) == MAIN
        found += [Candidate(method, keep, of) for method in METHODS if main or "seed" not in method]
        compensated = COMPENSATED if (keep, of) in (MAIN, HALF) else ("obs", "ecodiff")
        found += [Candidate(method, keep, of, "least_squares") for method in compensated]
        if main:
            found += [Candidate(method, keep, of, "sequential") for method in ("obs", "ecodiff")]
            found += [Candidate("ecodiff", keep, of, shuffle=seed) for seed in range(3)]
            found += [Candidate(method, keep, of, "bias") for method in ("obs", "ecodiff")]
        if of == "macs":
            found.append(Candidate(None, keep, of))
    return found
