"""Exponentially averaged weights of a training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class AveragedWeights:
    """`w <- d w + (1 - d) p` after each step, with `d = min(decay, (1 + step) / (10 + step))`.

    Args:
        parameters: name -> trained parameter.
        decay: in [0, 1).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = dict(parameters), decay
        self.weights = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after optimiser step number `step`, from 0."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.parameters.items():
            self.weights[name].lerp_(parameter, share)

    @torch.no_grad()
    def put(self) -> None:
        """Copy the average into the parameters."""
        copy_weights(self.parameters, self.weights)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average in the parameters inside; their own values again afterwards."""
        own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        try:
            self.put()
            yield
        finally:
            copy_weights(self.parameters, own)


@torch.no_grad()
def copy_weights(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    """Copy tensors into parameters of the same names, in place."""
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
