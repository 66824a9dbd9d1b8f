"""`TimestepRouter`: experts by noise level instead of by prompt, behind the same face as `PromptRouter`."""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genprune.errors import GenpruneError
from genprune.plan import PlanBase
from genprune.routers.expert_set import ExpertSet
from genprune.routers.experts import Expert


class TimestepRouter(ExpertSet):
    """One expert for each interval of noise levels: all prompts take all of them, one after another.

    Args:
        experts: K of them, from clean to noisy. `usage` is the share of the sampler's steps.
        boundaries: K - 1 noise levels in (0, 1), ascending, where the next expert begins.
        base, training, weights_fingerprint, made_by: see `ExpertSet`.

    Raises:
        GenpruneError: other boundaries.
        PlanMismatch: a plan is for another model.

    Reference:
        ALTER (NeurIPS 2025) and DiffPruning (Ganjdanesh et al., arXiv 2409.15557): experts of time steps.
    """

    kind = "timestep"

    def __init__(
        self,
        experts: Sequence[Expert],
        boundaries: Sequence[float],
        *,
        base: PlanBase,
        training: Mapping[str, Any] | None = None,
        weights_fingerprint: str | None = None,
        made_by: Mapping[str, Any] | None = None,
    ) -> None:
        experts = tuple(experts)
        self.boundaries = _checked_boundaries(boundaries, len(experts))
        super().__init__(
            experts, base=base, training=training, weights_fingerprint=weights_fingerprint, made_by=made_by
        )

    def expert_at(self, noise: float) -> int:
        """The expert of one denoising step.

        Args:
            noise: level of the step in [0, 1]: its share of the training timesteps, or its sigma in flow matching.
                A level on a boundary belongs to the noisier side.

        Raises:
            GenpruneError: no level of noise.
        """
        noise = float(noise)
        if not 0 <= noise <= 1:  # NaN included
            raise GenpruneError(
                f"the noise level is {noise}; expected one in [0, 1]. Pass timestep / num_train_timesteps, or the "
                "sigma of a flow-matching step."
            )
        return bisect.bisect_right(self.boundaries, noise)

    def report(self) -> str:
        """The table of `ExpertSet.report`, with the intervals."""
        ends = [0.0, *self.boundaries, 1.0]
        told = ", ".join(f"{index}: {low:.3g}-{high:.3g}" for index, (low, high) in enumerate(zip(ends, ends[1:])))
        return f"{super().report()}\nnoise levels of the experts: {told}"

    def summary(self) -> dict[str, Any]:
        """The figures of `report` as JSON data."""
        return super().summary() | {"boundaries": list(self.boundaries)}

    def save_pretrained(self, folder: str | os.PathLike) -> Path:
        """Write `router_config.json` and `experts/00` ... Nothing is left half-written.

        Raises:
            PlanMismatch: `folder` is a file, or holds something else than a router.
        """
        from genprune.routers.router_format import save_router

        return save_router(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, encoder: Any = None, pipe: Any = None) -> TimestepRouter:
        """Read a router; `encoder` and `pipe` are not used. Raises `PlanMismatch`, as `PromptRouter` does."""
        from genprune.routers.router_format import load_router

        return load_router(folder, kind=cls.kind)


def _checked_boundaries(boundaries: Sequence[float], experts: int) -> tuple[float, ...]:
    try:
        found = tuple(float(value) for value in boundaries)
    except (TypeError, ValueError):
        raise GenpruneError(
            f"boundaries={boundaries!r}; expected numbers in (0, 1), ascending, one fewer than experts. Pass such as "
            "(0.3, 0.7)."
        ) from None
    ends = (0.0, *found, 1.0)
    ascending = all(math.isfinite(value) for value in found) and all(a < b for a, b in zip(ends, ends[1:]))
    if len(found) != max(0, experts - 1) or not ascending:
        raise GenpruneError(
            f"the boundaries are {found} for {experts} experts; expected {max(0, experts - 1)} ascending numbers in "
            "(0, 1). Pass one where each next expert begins."
        )
    return found
