"""Layers with two sets of weights: the compensated ones, and the dense ones to compare with or to go back to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class Exchange:
    """Replaces weights of layers in place and holds the old tensors; no third copy is ever made.

    Parameters stay the same objects, so that optimisers and hooks that know them still do.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._other: dict[tuple[str, str], Tensor] = {}  # (layer, parameter) -> the tensor that is not in the model

    def put(self, path: str, weight: Tensor, bias: Tensor | None) -> None:
        """Give a layer new values, in its own dtype."""
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                parameter = getattr(self.model.get_submodule(path), name)
                self._other.setdefault((path, name), parameter.data)
                parameter.data = value.to(parameter.device, parameter.dtype).reshape(parameter.shape).contiguous()

    def _swap(self) -> None:
        for (path, name), held in self._other.items():
            parameter = getattr(self.model.get_submodule(path), name)
            self._other[path, name], parameter.data = parameter.data, held

    @contextmanager
    def dense(self) -> Iterator[None]:
        """The old values inside the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def restore(self) -> None:
        """Put the old values back for good."""
        self._swap()
        self._other.clear()
