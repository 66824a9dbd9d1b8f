"""Token Merging, the merge baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from genprune.errors import GenpruneError
from genprune.tokens import checks
from genprune.tokens.choice import Choice, LayerView
from genprune.tokens.matching import tome_matching, unit_keys
from genprune.tokens.methods.base import TokenMethod


@dataclass(frozen=True)
class ToMe(TokenMethod):
    """Token Merging, the merge baseline: every second token may merge into its most similar one of the others.

    Re-implemented from the paper: cosine of keys averaged over heads, alternate split, means weighted by size, between
    attention and MLP, log-size attention (`proportional`; the paper turns it off for MAE models).

    Args:
        r: tokens that go in every layer, >= 0; at most half of the patches do. None: as `keep` says.
        keep: instead of `r`. When neither is given 0.65.

    Reference:
        Bolya et al., arXiv 2210.09461.
    """

    keep: float | Mapping[int, float | int] | None = None
    reduce: str = "merge"
    placement: str = "before_mlp"
    proportional: bool = True
    r: int | None = None

    name: ClassVar[str] = "tome"
    fall: ClassVar[str] = "count"
    spacing: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.r is None and self.keep is None:
            object.__setattr__(self, "keep", 0.65)
        super().__post_init__()
        if self.r is not None:
            checks.check_whole("r", self.r, 0)
            if self.keep is not None:
                raise GenpruneError(
                    f"r={self.r} and keep={self.keep} both say how many tokens stay; expected one of them. Leave one "
                    "out."
                )

    def changed(self, **changes: Any) -> TokenMethod:
        """A copy with other values; a new `keep` takes the place of `r`, and the other way round."""
        if changes.get("keep") is not None:
            changes.setdefault("r", None)
        elif changes.get("r") is not None:
            changes.setdefault("keep", None)
        return super().changed(**changes)

    def counts(self, patches: int, depth: int) -> tuple[int, ...]:
        """Patches after each of `depth` layers: r fewer, at most half of them.

        Raises:
            GenpruneError: the method has `keep` and no `r`.
        """
        if self.r is None:
            raise GenpruneError(f"ToMe has keep={self.keep} and no r; expected ToMe(r=13) for counts by r. Set r.")
        counts = []
        for _ in range(depth):
            patches -= min(self.r, patches // 2)
            counts.append(patches)
        return tuple(counts)

    def _chosen(self, q: Tensor, k: Tensor, keep: int, view: LayerView) -> Choice:
        padding = ~view.valid if view.valid is not None else None
        return tome_matching(unit_keys(k), keep, view.prefix, padding)
