"""What is switched on a model for the length of a call, and back: frozen weights, blocks checkpointed by the host."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn


@contextlib.contextmanager
def frozen(*modules: nn.Module, but: tuple[Tensor, ...] = ()) -> Iterator[None]:
    """No parameter of the modules requires a gradient inside, but for those in `but`; as before afterwards."""
    spared = {id(tensor) for tensor in but}
    held = []
    for module in modules:
        names = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in spared]
        held.append((module, names))
    try:
        _require_grad(held, False)
        yield
    finally:
        _require_grad(held, True)


def _require_grad(held: list[tuple[nn.Module, list[str]]], value: bool) -> None:
    for module, names in held:
        parameters = dict(module.named_parameters()) if names else {}
        for name in names:  # by name: offloading puts other tensors in the same places
            parameters[name].requires_grad_(value)


@contextlib.contextmanager
def blocks_checkpointed(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Switch the host's own gradient checkpointing of its blocks; as before afterwards."""
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    switches = [module for module in model.modules() if hasattr(module, names[0])]
    before = [{name: module.__dict__[name] for name in names if name in module.__dict__} for module in switches]
    try:
        if enabled:
            model.enable_gradient_checkpointing()
        else:
            for module in switches:
                module.gradient_checkpointing = False
        yield
    finally:
        for module, state in zip(switches, before):
            for name in names:
                module.__dict__.pop(name, None)
            module.__dict__.update(state)
