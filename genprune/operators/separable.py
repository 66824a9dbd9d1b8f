"""A convolution as a depthwise one and a pointwise one."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from genprune.operators.base import Operator, blank, placement, whole_number


class SeparableConv(Operator):
    """A k x k `Conv2d` as k x k depthwise with m maps per input channel, then 1x1, by a truncated SVD.

    For each input channel c the matrix `W[:, c]`, `(out, k*k)`, becomes its best one of rank m: the rows of V are the
    depthwise kernels, the columns of U S the pointwise weights. Stride, padding, dilation and bias stay.

    Settings: `multiplier`, m, 1 to min(out, k*k); at k*k it is exact, and dearer than the convolution.

    Cost per output position: `in m (k*k + out)` instead of `in out k*k`.
    """

    name = "separable"
    options = ("multiplier",)

    @classmethod
    def refuses(cls, removed: nn.Module) -> str | None:
        if type(removed).forward is not nn.Conv2d.forward:
            return "expected a Conv2d"
        if removed.groups != 1:
            return f"it has {removed.groups} groups; expected one"
        if removed.kernel_size == (1, 1):
            return "its kernel is 1x1; use 'low_rank' for it"
        if not removed.weight.is_floating_point():
            return f"its weight is {removed.weight.dtype}"
        return None

    def layers(self, removed: nn.Module) -> nn.Module:
        place, taps = placement(removed), removed.weight[0, 0].numel()
        wide, out = removed.in_channels, removed.out_channels
        maps = whole_number(type(self), self.settings, "multiplier", most=min(out, taps)) * wide
        depthwise = blank(
            nn.Conv2d,
            *(wide, maps, removed.kernel_size, removed.stride, removed.padding, removed.dilation, wide),
            bias=False,
            padding_mode=removed.padding_mode,
            **place,
        )
        pointwise = blank(nn.Conv2d, maps, out, 1, bias=removed.bias is not None, **place)
        return nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=pointwise))

    def take_weights(self, removed: nn.Module) -> None:
        rank, layers = self.settings["multiplier"], self.replacement
        per_channel = removed.weight.detach().double().transpose(0, 1).flatten(2)  # (in, out, k*k)
        left, values, right = torch.linalg.svd(per_channel, full_matrices=False)
        half = values[:, :rank].sqrt()
        kernels = half[:, :, None] * right[:, :rank]  # (in, m, k*k): outputs of input c are c*m ... c*m + m - 1
        mixing = (left[:, :, :rank] * half[:, None]).transpose(0, 1)  # (out, in, m)
        layers.depthwise.weight.copy_(kernels.reshape(layers.depthwise.weight.shape))
        layers.pointwise.weight.copy_(mixing.reshape(layers.pointwise.weight.shape))
        if removed.bias is not None:
            layers.pointwise.bias.copy_(removed.bias)

    def forward(self, input: Tensor, *args, **kwargs) -> Tensor:
        return self.replacement(input)
