"""A model in evaluation mode with frozen parameters for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with frozen parameters inside; modes and `requires_grad` as they were afterwards."""
    modes = {module: module.training for module in model.modules()}
    frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        model.requires_grad_(False)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in frozen:
            parameter.requires_grad_(flag)
