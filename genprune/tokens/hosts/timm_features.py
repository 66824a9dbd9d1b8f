"""Models made by `timm.create_model(..., features_only=True)`: the transformer inside is the host."""

from __future__ import annotations

from torch import nn

from genprune.tokens import hosts


def host_of(model: nn.Module) -> hosts.TokenHost | None:
    try:
        from timm.models._features import FeatureGetterNet
    except ModuleNotFoundError:
        return None
    return hosts.host_of(model.model) if isinstance(model, FeatureGetterNet) else None
