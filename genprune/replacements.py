"""Modules that stand where a removed part of a model stood, and keep a trace of it in the state dict.

A stock loader that meets a shortened model must fail rather than fill the gap with random weights. So each
replacement holds a zero-element buffer under the name of every parameter that went: its shape fits no stock layer.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor, nn


class Tombstone(nn.Module):
    """Zero-element buffers under a removed module's parameter names, nested as they were.

    `own` names the sub-modules that a stand-in has of its own: they were in no stock layer, and get no tombstone.
    """

    own: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def of(cls, removed: nn.Module) -> Self:
        """What stands where `removed` stood, with a tombstone for each of its tensors."""
        module = cls()
        module.bury(removed)
        return module

    def bury(self, removed: nn.Module, keep: tuple[str, ...] = ()) -> None:
        """Add a tombstone for each tensor of `removed`, but for sub-modules named in `keep`."""
        tensors = [*removed.named_parameters(remove_duplicate=False), *removed.named_buffers(remove_duplicate=False)]
        # What is ours is in no stock layer: cutting twice leaves the same names as cutting once.
        ours = [f"{n}.index".lstrip(".") for n, m in removed.named_modules() if isinstance(m, ScatteredLinear)]
        for path, module in removed.named_modules():
            if isinstance(module, Tombstone):
                ours += [f"{path}.{name}".lstrip(".") for name in module.own]
        for name, tensor in tensors:
            if not any(name == kept or name.startswith(f"{kept}.") for kept in (*ours, *keep)):
                self._place(name.split("."), tensor)

    def _place(self, path: list[str], tensor: Tensor) -> None:
        if len(path) == 1:
            # A buffer keeps the device and dtype rules of the model that it is in; `register_parameter` would train.
            self.register_buffer(path[0], torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            return
        if path[0] not in self._modules:
            self.add_module(path[0], Tombstone())
        self._modules[path[0]]._place(path[1:], tensor)


class ZeroOutput(Tombstone):
    """A removed residual branch: zeros of the shape of its input."""

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states.new_zeros(()).expand(hidden_states.shape)


class PassThrough(Tombstone):
    """A removed block or norm whose host hands the first argument on: returns it."""

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states


class ScatteredLinear(nn.Linear):
    """A linear layer that computes some of its outputs and leaves zeros at the others.

    `index` holds the computed positions among `full_features`, shape `(out_features,)`; it travels with the weights.
    """

    def __init__(self, in_features: int, index: Tensor, full_features: int, bias: bool, device=None, dtype=None):
        super().__init__(in_features, index.numel(), bias=bias, device=device, dtype=dtype)
        self.full_features = full_features
        self.register_buffer("index", index.to(device=device, dtype=torch.long))

    def reset_parameters(self) -> None:
        if self.weight.numel():  # torch warns where there is nothing to fill
            super().reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        return self.scattered(super().forward(input))

    def scattered(self, narrow: Tensor) -> Tensor:
        """Computed outputs, shape `(..., out_features)`, at their places among zeros: `(..., full_features)`."""
        wide = narrow.new_zeros(*narrow.shape[:-1], self.full_features)
        return wide.index_copy(-1, self.index, narrow)

    def scatter_output(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        """Forward hook for what is added to this layer's output, such as a LoRA of its size."""
        return self.scattered(output)
