"""A U-Net's resampling without its k x k convolution."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from genprune.operators.base import Operator, Ridge, blank, is_host, placement


class PooledResampler(Operator):
    """`Downsample2D` as 2x2 average pooling and 1x1 convolution, `Upsample2D` as 1x1 convolution and interpolation.

    No settings. From the weights it sums the taps of each kernel, which is exact for constant fields away from the
    borders; from data it is the least-squares map. A 1x1 convolution and nearest interpolation commute, so that the
    convolution runs on the small map.

    Cost: `in out` per position instead of `9 in out`, on a quarter of the positions for `Upsample2D`.
    """

    name = "pooled"
    moments = "matrix"

    @classmethod
    def needs_data(cls, settings: Mapping[str, Any]) -> bool:
        return False

    @classmethod
    def takes_data(cls, settings: Mapping[str, Any]) -> bool:
        return True

    @classmethod
    def refuses(cls, removed: nn.Module) -> str | None:
        if not is_host(removed, "Downsample2D", "Upsample2D"):
            return "expected a Downsample2D or Upsample2D"
        if not removed.use_conv:
            return "it has no convolution to save"
        if removed.norm is not None:
            return "it holds a norm"
        if is_host(removed, "Upsample2D"):
            if removed.use_conv_transpose or not removed.interpolate:
                return "expected one that interpolates and then convolves"
            return None
        conv = removed.conv
        plain = isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.stride == (2, 2)
        return (
            None if plain and removed.padding in (0, 1) else "expected a 3x3 convolution of stride 2, padding 0 or 1"
        )

    def layers(self, removed: nn.Module) -> nn.Module:
        self.upsamples = is_host(removed, "Upsample2D")
        conv = _convolution(removed)
        return blank(nn.Conv2d, conv.in_channels, conv.out_channels, 1, bias=conv.bias is not None, **placement(conv))

    def take_weights(self, removed: nn.Module) -> None:
        conv = _convolution(removed)
        self.replacement.weight.copy_(conv.weight.double().sum((2, 3), keepdim=True))
        if conv.bias is not None:
            self.replacement.bias.copy_(conv.bias)

    def maps(self) -> dict[str, tuple[int, int]]:
        return {"map": (self.replacement.in_channels, self.replacement.out_channels)}

    def rows(self, given: Mapping[str, Any], output: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
        inputs = self._resized(given["hidden_states"], given.get("output_size"))
        yield "map", inputs.movedim(1, -1).flatten(0, -2), output.movedim(1, -1).flatten(0, -2)

    @torch.no_grad()
    def fit(self, removed: nn.Module, moments: Mapping[str, Any], ridge: Ridge) -> None:
        weight, bias = ridge(moments["map"], self.replacement.bias is not None)
        self.replacement.weight.copy_(weight[:, :, None, None])
        if self.replacement.bias is not None:
            self.replacement.bias.copy_(bias)

    def _resized(self, inputs: Tensor, output_size: Any) -> Tensor:
        if not self.upsamples:
            # Padding 1 rounds an odd size up, padding 0 rounds it down; the window that juts out counts its inside.
            return functional.avg_pool2d(inputs, 2, ceil_mode=self.padding == 1)
        if output_size is None:
            return functional.interpolate(inputs, scale_factor=2.0, mode="nearest")
        return functional.interpolate(inputs, size=output_size, mode="nearest")

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args, **kwargs) -> Tensor:
        if self.upsamples:
            return self._resized(self.replacement(hidden_states), output_size)
        return self.replacement(self._resized(hidden_states, None))


def _convolution(resampler: nn.Module) -> nn.Conv2d:
    conv = getattr(resampler, "conv", None)
    return resampler.Conv2d_0 if conv is None else conv
