"""What a token reduction has put on a model, found again on the model itself (a deep copy, an unpickled one)."""

from __future__ import annotations

import sys

import torch
from torch import nn

from genprune.tokens.state import CompiledApart, Shadow, TokenState

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_FLAGS = ("_with_kwargs", "_always_called")


class FoundHook:
    """A hook that is on a module, with the `remove()` of the handle that was lost."""

    def __init__(self, module: nn.Module, kind: str, key: int):
        self.module, self.kind, self.key = module, kind, key

    def remove(self) -> None:
        getattr(self.module, self.kind).pop(self.key, None)
        for flag in _FLAGS:
            getattr(self.module, self.kind + flag, {}).pop(self.key, None)


def found_on(model: nn.Module) -> tuple[TokenState | None, list]:
    """The state of the reduction on a model and all that was attached, objects with `remove()`; None and []: none."""
    state, found = None, []
    for module in model.modules():
        for kind in _HOOKS:
            for key, hook in getattr(module, kind).items():
                if (one := _state_of(hook)) is not None:
                    state = one
                    found.append(FoundHook(module, kind, key))
        for value in module.__dict__.values():
            if isinstance(value, Shadow):
                state = value.state
                found.append(value)
    return state, found


def steps_of(attached: list):
    """What the hooks of a denoiser that were found know across calls."""
    hooks = (getattr(one.module, one.kind)[one.key] for one in attached if isinstance(one, FoundHook))
    return next(hook.__self__.steps for hook in hooks)


def take_off(model: nn.Module) -> None:
    """Remove whatever a token reduction has put on a model."""
    for hook in found_on(model)[1]:
        hook.remove()


def reduced(model: nn.Module) -> bool:
    """Whether hooks of a token reduction are on the model."""
    return found_on(model)[0] is not None


def _state_of(hook) -> TokenState | None:
    state = getattr(getattr(hook, "__self__", None), "state", None)
    return state if isinstance(state, TokenState) else None


def told_compilers(model: nn.Module, state: TokenState) -> list:
    """What makes `torch.compile` see the hooks that were just put on, objects with `remove()`.

    Where a model has no method for `CompiledApart` to stand before, everything that was compiled in this process is
    forgotten, now and when the hooks come off.
    """
    if isinstance(model.__dict__.get(CompiledApart.name), Shadow):
        return []  # the host needed one there itself
    if hasattr(type(model), CompiledApart.name):
        return [CompiledApart(model, state).attach()]
    forgotten = Forgotten()
    forgotten.remove()
    return [forgotten]


class Forgotten:
    """Forgets what was compiled in this process, where anything was."""

    def remove(self) -> None:
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
