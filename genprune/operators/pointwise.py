"""Nothing, or something simpler, in the place of an activation; nothing in the place of a norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genprune.operators.base import Operator
from genprune.operators.norms import feature_dim

_HOMES = ("torch.nn.modules.activation", "timm.layers.activations", "diffusers.models.activations")
# Of these homes, what mixes features or changes their number.
_NOT_ELEMENTWISE = ("GLU", "MultiheadAttention", "Softmax", "Softmax2d", "Softmin", "LogSoftmax")


def is_activation(module: nn.Module) -> bool:
    """Whether the module is a function of each number on its own, without parameters."""
    kind = type(module)
    bare = not any(True for _ in module.parameters()) and not any(True for _ in module.children())
    return bare and kind.__module__.startswith(_HOMES) and kind.__name__ not in _NOT_ELEMENTWISE


class IdentityOperator(Operator):
    """Its input, in the place of an activation (SiLU, GELU, ...) or of a norm. No settings."""

    name = "identity"

    @classmethod
    def refuses(cls, removed: nn.Module) -> str | None:
        if is_activation(removed) or feature_dim(removed) is not None:
            return None
        return "expected an activation of single numbers, or a group, layer or RMS norm"

    def forward(self, *args, **kwargs) -> Tensor:
        return self.first(args, kwargs)


class ReLUOperator(Operator):
    """`max(x, 0)` in the place of another activation. No settings."""

    name = "relu"

    @classmethod
    def refuses(cls, removed: nn.Module) -> str | None:
        if not is_activation(removed):
            return "expected an activation of single numbers, such as SiLU or GELU"
        return "it is a ReLU already" if isinstance(removed, nn.ReLU) else None

    def forward(self, *args, **kwargs) -> Tensor:
        return torch.relu(self.first(args, kwargs))
