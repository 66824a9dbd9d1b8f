"""Parts of a U-Net that leave with a partner: a ResNet block with its skip, a resampler with its opposite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn

from genprune.errors import GenpruneError
from genprune.operators.base import Operator, is_host, whole_number


class DropSkip(Operator):
    """An up-path `ResnetBlock2D` gone together with its skip: the hidden channels of its input `[hidden | skip]`.

    Settings: `channels`, the hidden channels that the block is given before its skip. The next layer reads
    `out_channels`, so that only a block with `channels == out_channels` can go this way.

    Reference:
        BK-SDM (arXiv 2305.15798): a down ResNet block leaves with its partner on the way up.
    """

    name = "drop_skip"
    options = ("channels",)

    @classmethod
    def refuses(cls, removed: nn.Module) -> str | None:
        if not is_host(removed, "ResnetBlock2D"):
            return "expected a ResnetBlock2D of the up path of a U-Net"
        if removed.up or removed.down:
            return "it resamples, so that its output has another size than its input"
        if removed.in_channels <= removed.out_channels:
            return f"it reads {removed.in_channels} channels and returns {removed.out_channels}: it has no skip"
        return None

    @classmethod
    def build(cls, removed: nn.Module, settings: Mapping[str, Any]) -> Self:
        module = super().build(removed, settings)
        channels = whole_number(cls, module.settings, "channels")
        if channels != removed.out_channels:
            raise GenpruneError(
                f"'{cls.name}' hands {channels} hidden channels on, but what follows reads {removed.out_channels}; "
                "expected as many. Remove this block's branch instead, which keeps its shortcut."
            )
        return module

    def forward(self, input_tensor: Tensor, *args, **kwargs) -> Tensor:
        return input_tensor[:, : self.out_channels]  # (B, hidden + skip, H, W) -> (B, hidden, H, W)


class DropResampler(Operator):
    """A `Downsample2D` or `Upsample2D` gone: its input. Both ends of a stage go together (BK-SDM Tiny)."""

    name = "drop_resampler"

    @classmethod
    def refuses(cls, removed: nn.Module) -> str | None:
        if not is_host(removed, "Downsample2D", "Upsample2D"):
            return "expected a Downsample2D or Upsample2D"
        if removed.channels != removed.out_channels:
            return f"it turns {removed.channels} channels into {removed.out_channels}"
        return None

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states
