"""Outputs handed out more than once: their containers anew, and copies where a host edits tensors in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def same(value: Any) -> Any:
    return value


def rebuilt(value: Any, change: Callable[[Tensor], Tensor] = same, strict: bool = True) -> Any:
    """The same containers anew, with `change` of each tensor in them.

    Raises:
        TypeError: `strict`, and something is neither a tensor, a number, a text, None, nor a container of such.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):  # also the host's output classes
        items = {name: rebuilt(item, change, strict) for name, item in value.items()}
        return items if type(value) is dict else type(value)(**items)
    if isinstance(value, (list, tuple)):
        items = [rebuilt(item, change, strict) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if strict and not isinstance(value, (int, float, str, type(None))):
        raise TypeError(f"{type(value).__name__} is no plain output")
    return value


def versions(value: Any) -> tuple[int, ...]:
    """How often each tensor in there was edited in place. Raises `TypeError` where that is not known."""
    found: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.is_inference():
            raise TypeError("a tensor made in inference mode does not know that it was edited")
        found.append(tensor._version)
        return tensor

    rebuilt(value, note)
    return tuple(found)


class Copies:
    """Copies of tensors: those that share memory when they are copied share it as copies too.

    A host that edits one of them in place then edits the others, as it does with the originals.
    """

    def __init__(self):
        self.storages: dict[tuple[int, int], tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_meta or not storage.nbytes():
            return tensor
        key = storage.data_ptr(), tensor._version
        if key not in self.storages:
            self.storages[key] = storage, storage.clone()  # the original is held, so that its address stays its own
        copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return copy.set_(self.storages[key][1], tensor.storage_offset(), tensor.size(), tensor.stride())


class Recalled(nn.Module):
    """Stands for a module that has run before and returns what it returned then, whatever it is given.

    Everything else is the original's: attributes that hosts read, and parameters, in the same order.
    """

    def __init__(self, original: nn.Module, output: Any, change: Callable[[Tensor], Tensor] = same):
        super().__init__()
        self.original = original
        self.training = original.training
        self._recalled = output  # a plain name could hide an attribute of the original's
        self._handed_out = change

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)

    def forward(self, *args, **kwargs) -> Any:
        return rebuilt(self._recalled, self._handed_out)
