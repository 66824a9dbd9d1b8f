"""One fixed scale and shift per channel in the place of a norm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from genprune.operators.base import Operator, Ridge, placement

# Classes of norms of torch, diffusers and timm -> the dimension of their channels. A subclass may do something else.
_CHANNEL_DIMS = {
    "GroupNorm": 1,
    "GroupNorm1": 1,
    "LayerNorm2d": 1,
    "LayerNorm2dFp32": 1,
    "RmsNorm2d": 1,
    "RmsNorm2dFp32": 1,
    "LayerNorm": -1,
    "LayerNormFp32": -1,
    "FP32LayerNorm": -1,
    "RMSNorm": -1,
    "RmsNorm": -1,
    "RmsNormFp32": -1,
}


def feature_dim(norm: nn.Module) -> int | None:
    """The dimension of a norm's channels: 1 or -1; None for what is no norm, or one of several dimensions."""
    dim = _CHANNEL_DIMS.get(type(norm).__name__)
    return dim if dim is None or _channels(norm) else None


def _channels(norm: nn.Module) -> int:
    """The number of channels; 0 where the norm is of several dimensions."""
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels
    shape = norm.normalized_shape if hasattr(norm, "normalized_shape") else getattr(norm, "dim", ())
    return shape[0] if len(shape) == 1 else 0


class ChannelScale(nn.Module):
    """`x * weight + bias` for each channel along `dim`, in the dtype of x; the parameters have shape `(channels,)`."""

    def __init__(self, channels: int, dim: int, device=None, dtype=None):
        super().__init__()
        self.dim = dim
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        shape = [1] * input.ndim
        shape[self.dim] = -1
        # Cast at use, as norms do: a float32 scale would promote a bfloat16 stream.
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        return torch.addcmul(bias.view(shape), input, weight.view(shape))


class AffineNorm(Operator):
    """A group, layer or RMS norm with the statistics of calibration data instead of its input's own. No settings.

        y_c = a_c x_c + b_c,   a_c = cov(x_c, y_c) / var(x_c),   b_c = E[y_c] - a_c E[x_c]

    with y what the norm returned, its own weight and bias included: the best scale and shift of each channel in the
    mean square. Where the norm's mean m and deviation s never change, this is exactly `weight (x - m) / s + bias`.
    A channel that is constant on the data has `a_c = 0`. For a norm without tensors the operator is on torch's
    default device; the caller moves it to the model's.
    """

    name = "affine"
    moments = "channels"

    @classmethod
    def refuses(cls, removed: nn.Module) -> str | None:
        if feature_dim(removed) is None:
            return "expected a group, layer or RMS norm over one dimension of channels"
        return None

    def layers(self, removed: nn.Module) -> nn.Module:
        return ChannelScale(_channels(removed), feature_dim(removed), **placement(removed))

    def maps(self) -> dict[str, tuple[int, int]]:
        channels = self.replacement.weight.numel()
        return {"map": (channels, channels)}

    def rows(self, given: Mapping[str, Any], output: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
        dim = self.replacement.dim
        inputs = given[self.argument_names[0]]
        yield "map", inputs.movedim(dim, -1).flatten(0, -2), output.movedim(dim, -1).flatten(0, -2)

    @torch.no_grad()
    def fit(self, removed: nn.Module, moments: Mapping[str, Any], ridge: Ridge) -> None:
        found = moments["map"]
        variance = found.second - found.mean.square()
        varies = variance > 1e-12 * found.second
        scale = torch.where(varies, (found.cross - found.mean * found.lack) / variance.where(varies, 1.0), 0.0)
        self.replacement.weight.copy_(scale)
        self.replacement.bias.copy_(found.lack - scale * found.mean)

    def forward(self, *args, **kwargs) -> Tensor:
        return self.replacement(self.first(args, kwargs))
