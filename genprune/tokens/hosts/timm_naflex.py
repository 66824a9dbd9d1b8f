"""timm's `NaFlexVit`: images of any shape, as pictures or as padded sequences of patches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from genprune.tokens.hosts.timm_vit import TimmViT
from genprune.tokens.state import Shadow, TokenState


class ShortenedValidity(Shadow):
    """What `forward_features` says about padding, for the patches that are left."""

    name = "forward_features"

    def __call__(self, *args, **kwargs):
        features = self.host(*args, **kwargs)
        now = self.state.at[self.state.depth]
        if not isinstance(features, dict) or now is None or now.origin is None or now.grid:
            return features
        valid = features["patch_valid"]
        return {**features, "patch_valid": None if valid is None else valid.gather(1, now.origin)}


@dataclass
class TimmNaFlex(TimmViT):
    """Padded patches are the first to go; a sequence of patches alone needs no other handling than an image."""

    @property
    def embedding(self) -> nn.Module:
        return self.model.embeds

    def count_patches(self) -> int:
        return math.prod(self.embedding.dynamic_feat_size(self.image_size()))

    def image_size(self) -> tuple[int, int]:
        return tuple(self.model.pretrained_cfg["input_size"][1:])

    @property
    def class_token(self) -> bool:
        return self.embedding.cls_token is not None

    def attach(self, state: TokenState) -> list:
        return [*super().attach(state), ShortenedValidity(self.model, state).attach()]


def host_of(model: nn.Module) -> TimmNaFlex | None:
    try:
        from timm.models.naflexvit import NaFlexVit
    except ModuleNotFoundError:
        return None
    return TimmNaFlex(model) if isinstance(model, NaFlexVit) else None
