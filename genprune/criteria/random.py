"""Random scores: the baseline that every other criterion has to beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from genprune.sites import Sites


@dataclass(frozen=True)
class RandomScores:
    """Uniform in [0, 1) for each unit. A site's draws depend on `seed` and its name only, not on other sites."""

    seed: int = 0

    name: ClassVar[str] = "random"
    needs: ClassVar[tuple[str, ...]] = ()
    additive: ClassVar[bool] = False
    summary: ClassVar[str] = "random units; the baseline to beat"

    def scores(self, model: nn.Module, sites: Sites, calibration=None) -> dict[str, Tensor]:
        """Site name -> scores of shape `(size,)`."""
        return {name: torch.rand(site.size, generator=self._generator(name)) for name, site in sites.items()}

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
