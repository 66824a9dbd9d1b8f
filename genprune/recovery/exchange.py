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
        # (layer, parameter) -> its tensor; two, so that what an interrupt leaves half done can be undone as a whole
        self._dense: dict[tuple[str, str], Tensor] = {}
        self._new: dict[tuple[str, str], Tensor] = {}

    def put(self, path: str, weight: Tensor, bias: Tensor | None) -> None:
        """Give a layer new values, in its own dtype."""
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                parameter = getattr(self.model.get_submodule(path), name)
                self._dense.setdefault((path, name), parameter.data)
                new = value.to(parameter.device, parameter.dtype).reshape(parameter.shape).contiguous()
                self._new[path, name] = parameter.data = new

    def _show(self, values: dict[tuple[str, str], Tensor]) -> None:
        for (path, name), value in values.items():
            getattr(self.model.get_submodule(path), name).data = value

    @contextmanager
    def dense(self) -> Iterator[None]:
        """The old values inside the block."""
        try:
            self._show(self._dense)
            yield
        finally:
            self._show(self._new)

    def restore(self) -> None:
        """Put the old values back for good."""
        self._show(self._dense)
        self._dense.clear()
        self._new.clear()
