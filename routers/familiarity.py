"""Whether a prompt is like those that a router was trained on, prompt by prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from genprune.errors import PlanMismatch

MOST = 256  # training embeddings that are kept
QUANTILE = 0.01
MARGIN = 0.25  # of what the quantile lies below 1
FEWEST = 16  # different training prompts that a quantile can be read from
UNKNOWN = 0.5  # share of a prompt's tokens


@dataclass(frozen=True)
class Familiarity:
    """How near the training prompts lie to each other, and a sample of them.

    Args:
        embeddings: L2-normalised embeddings of training prompts, float16 of shape `(at most 256, dim)`.
        floor: least cosine similarity to the nearest of them at which a prompt is familiar, in [-1, 1]; None where
            there were too few different training prompts to say.
    """

    embeddings: Tensor
    floor: float | None

    @classmethod
    def of(cls, embeddings: Tensor) -> Familiarity:
        """From the embeddings of the training prompts, shape `(n, dim)`.

        The floor is the 1 % quantile of their similarities to the nearest other kept one, less a quarter of what that
        is short of 1: sentences lie at .5 to .9, pooled text states at .99.
        """
        different = torch.unique(_directions(embeddings), dim=0)  # sorted: the order of the prompts does not count
        index = torch.linspace(0, len(different) - 1, min(MOST, len(different))).round().long()
        kept = different[index].half()
        if len(different) < FEWEST:
            return cls(kept, None)
        similar = different @ kept.float().T
        similar[index, torch.arange(len(index))] = -1.0  # not to itself
        quantile = float(similar.max(1).values.double().quantile(QUANTILE))
        return cls(kept, quantile - MARGIN * (1 - quantile))

    @classmethod
    def nothing(cls) -> Familiarity:
        """Of no training prompts: words alone are judged."""
        return cls(torch.zeros(0, 0, dtype=torch.float16), None)

    def reason(self, embedding: Tensor, unknown_share: float) -> str | None:
        """Why a prompt is unlike the training prompts, in words; None where it is like them.

        Args:
            embedding: of the prompt, shape `(dim,)`.
            unknown_share: of its tokens, in [0, 1].
        """
        if unknown_share > UNKNOWN:
            return f"the encoder has no entry for {unknown_share:.0%} of its words"
        if self.floor is None:
            return None
        nearest = float((self.embeddings.float() @ _directions(embedding)).max())
        if nearest < self.floor:
            return f"its similarity to the nearest training prompt is {nearest:.2f}, and was {self.floor:.2f} or more"
        return None

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds beside `to_json`."""
        return {"embeddings": self.embeddings}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data without the embeddings."""
        return {"floor": self.floor}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Familiarity:
        """Read what `to_json` and `tensors` gave. Raises `PlanMismatch` where a part is missing."""
        try:
            floor = data["floor"]
            embeddings = tensors["embeddings"]
            if embeddings.ndim != 2:
                raise ValueError(f"embeddings of shape {tuple(embeddings.shape)}")
            return cls(embeddings, None if floor is None else float(floor))
        except (KeyError, TypeError, ValueError) as error:
            raise PlanMismatch(
                f"what a router knows of its training prompts lacks a part ({error}); expected a floor and "
                "embeddings. Restore the router's files, or train it again."
            ) from None


def _directions(embeddings: Tensor) -> Tensor:
    return nn.functional.normalize(embeddings.detach().float().cpu(), dim=-1)
