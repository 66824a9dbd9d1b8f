"""A linear layer as the product of two narrow ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from genprune.errors import GenpruneError
from genprune.operators.base import Operator, Ridge, blank, placement, whole_number


class LowRank(Operator):
    """A `Linear` or 1x1 `Conv2d` of weight W as `up(down(x))` of rank r: `W ~ U V`, U `(out, r)`, V `(r, in)`.

    Settings: `rank`, 1 to min(in, out); `whitened` (default False): the best rank-r layer for the inputs that it is
    given, `min E||W x - U V x||^2`, instead of the best matrix, `min ||W - U V||_F^2`. It needs calibration data.

    Cost: `r (in + out)` weights instead of `in * out`. Exact at full rank, but cheaper only below
    `in * out / (in + out)`.

    Reference:
        Eckart-Young; whitened as in SVD-LLM (arXiv 2403.07378): the SVD of `W S`, with `S S^T = E[x x^T]`.
    """

    name = "low_rank"
    options = ("rank", "whitened")
    defaults = {"whitened": False}
    moments = "matrix"

    @classmethod
    def refuses(cls, removed: nn.Module) -> str | None:
        if type(removed).forward is nn.Conv2d.forward:
            if removed.kernel_size != (1, 1) or removed.groups != 1:
                return f"its kernel is {removed.kernel_size} in {removed.groups} groups; expected 1x1 in one group"
            if removed.padding_mode != "zeros" or isinstance(removed.padding, str):
                return "expected zero padding given as numbers"
        elif type(removed).forward is not nn.Linear.forward:
            return "expected a Linear, or a Conv2d of kernel 1x1"
        if not removed.weight.is_floating_point():
            return f"its weight is {removed.weight.dtype}"
        return None

    @classmethod
    def needs_data(cls, settings: Mapping[str, Any]) -> bool:
        return bool(settings["whitened"])

    @classmethod
    def checked(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        settings = super().checked(settings)
        if not isinstance(settings["whitened"], bool):
            raise GenpruneError(
                f"setting 'whitened' of '{cls.name}' is {settings['whitened']!r}; expected True or False. Pass one."
            )
        return settings

    def layers(self, removed: nn.Module) -> nn.Module:
        place, has_bias = placement(removed), removed.bias is not None
        wide, narrow = removed.weight.shape[1], removed.weight.shape[0]
        rank = whole_number(type(self), self.settings, "rank", most=min(wide, narrow))
        if isinstance(removed, nn.Linear):
            down = blank(nn.Linear, wide, rank, bias=False, **place)
            up = blank(nn.Linear, rank, narrow, bias=has_bias, **place)
        else:
            steps = {"stride": removed.stride, "padding": removed.padding}
            down = blank(nn.Conv2d, wide, rank, 1, bias=False, **steps, **place)
            up = blank(nn.Conv2d, rank, narrow, 1, bias=has_bias, **place)
        return nn.Sequential(OrderedDict(down=down, up=up))

    def take_weights(self, removed: nn.Module) -> None:
        self._put(removed, root=None)

    def maps(self) -> dict[str, tuple[int, int]]:
        return {"map": (self.replacement.down.weight.shape[1], 0)}

    def measured(self) -> tuple:
        return ()  # every rank reads the same moments

    def rows(self, given: Mapping[str, Any], output: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
        inputs, down = given["input"], self.replacement.down
        if isinstance(down, nn.Conv2d):
            inputs = inputs.movedim(-3, -1)[..., :: down.stride[0], :: down.stride[1], :]  # (B, H, W, C)
        rows = inputs.flatten(0, -2)
        yield "map", rows, rows[:, :0]  # the weight says what it returns

    @torch.no_grad()
    def fit(self, removed: nn.Module, moments: Mapping[str, Any], ridge: Ridge) -> None:
        second = moments["map"].second
        values, vectors = torch.linalg.eigh(second)
        # Directions that never occur cost nothing: a floor keeps the inverse finite.
        values = values.clamp_min(values[-1].clamp_min(1e-30) * 1e-12)
        self._put(removed, root=(vectors * values.sqrt(), vectors / values.sqrt()))

    def _put(self, removed: nn.Module, root: tuple[Tensor, Tensor] | None) -> None:
        """The truncated SVD of `W S`; `root` holds S and the transpose of its inverse, None the identity."""
        weight = removed.weight.detach().flatten(1).double()  # (out, in)
        left, values, right = torch.linalg.svd(weight if root is None else weight @ root[0], full_matrices=False)
        rank = self.settings["rank"]
        half = values[:rank].sqrt()
        up, down = left[:, :rank] * half, half[:, None] * right[:rank]
        if root is not None:
            down = down @ root[1].T
        layers = self.replacement
        layers.down.weight.copy_(down.reshape(layers.down.weight.shape))
        layers.up.weight.copy_(up.reshape(layers.up.weight.shape))
        if removed.bias is not None:
            layers.up.bias.copy_(removed.bias)

    def forward(self, input: Tensor, *args, **kwargs) -> Tensor:
        return self.replacement(input)
