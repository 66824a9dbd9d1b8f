"""What every family of diffusers models shares: a model is built from its configuration."""

from __future__ import annotations

from typing import Any

from torch import nn

from genprune.families import Family


class DiffusersFamily(Family):
    """A family whose hosts are diffusers models; `hosts[0]` is the class that is built."""

    def build(self, config: dict[str, Any]) -> nn.Module:
        import diffusers

        return getattr(diffusers, self.hosts[0]).from_config(config)

    def config(self, model: nn.Module) -> dict[str, Any]:
        return {k: v for k, v in model.config.items() if not k.startswith("_") and k != "pruning"}
