"""What a search over token counts ran, and what it found."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from genprune.tokens.methods import TokenMethod
from genprune.tokens.presets import TokenPreset
from genprune.tokens.schedule import Counts


@dataclass(frozen=True)
class Trial:
    """One candidate that was run.

    Attributes:
        budget: that it was fitted to.
        kind: `default` (the method's own layers), `drawn`, or `evolved` from better ones.
        counts: per layer, the patches that it hands on.
        similarity_share: of the method; None where it has none.
        keep: its share of the dense multiply-accumulates, scoring included.
        cost: its share of what the budget is of; for latency as predicted.
        distance: to the dense model, over the calibration images.
    """

    budget: float
    kind: str
    counts: Counts
    similarity_share: float | None
    keep: float
    cost: float
    distance: float

    def to_json(self) -> dict:
        return {**dataclasses.asdict(self), "counts": {str(layer): n for layer, n in self.counts.items()}}


@dataclass(frozen=True)
class TokenSearch:
    """What a search found.

    Attributes:
        presets: the best per budget, in the order of the budgets.
        trials: all that was run, in order.
        distance: what `Trial.distance` is.
        images: calibration images.
        seconds: it took.
    """

    presets: tuple[TokenPreset, ...]
    trials: tuple[Trial, ...]
    distance: str
    images: int
    seconds: float

    @property
    def preset(self) -> TokenPreset:
        """The best of the first budget: `gp.prune_tokens(model, search.preset)`."""
        return self.presets[0]

    @property
    def method(self) -> TokenMethod:
        """Its method, with explicit counts."""
        return self.preset.method

    def save(self, path: str | os.PathLike) -> None:
        """Write `preset` as a JSON file, which `gp.prune_tokens(model, path)` takes."""
        self.preset.save(path)

    def to_json(self) -> dict:
        return {
            "format_version": 1,
            "presets": [preset.to_json() for preset in self.presets],
            "trials": [trial.to_json() for trial in self.trials],
            "distance": self.distance,
            "images": self.images,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        lines = [f"budget    keep  {self.distance:>9}  found as  similarity  patches handed on"]
        for preset in self.presets:
            budget = preset.figures["budget"]
            tried = [trial for trial in self.trials if trial.budget == budget]
            for label, one in (("best", min(tried, key=lambda trial: trial.distance)), ("start", tried[0])):
                handed = ", ".join(f"{layer}: {count}" for layer, count in one.counts.items())
                share = "" if one.similarity_share is None else f"{one.similarity_share:.2f}"
                kind = one.kind if label == "best" else "(default)"
                lines.append(
                    f"{budget:>6.3f}  {one.keep:>6.4f}  {one.distance:>9.6f}  {kind:<8}  {share:>10}  {handed}"
                )
        lines.append(f"{len(self.trials)} trials on {self.images} images, {self.seconds:.0f} s")
        return "\n".join(lines)
