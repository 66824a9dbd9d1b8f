"""`UNetLayout`: how many layers and transformer blocks a U-Net has where; hosts and published shapes are both one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

Stages = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class UNetLayout:
    """Layers of a `UNet2DConditionModel`, widths left out.

    Args:
        down: for each stage, in the order of `down_blocks`, the transformer blocks of each layer; 0: no attention.
        middle: ResNet blocks of the middle, and transformer blocks of its attention; (0, 0): no middle.
        up: as `down`, in the order of `up_blocks`; a stage has one layer more on the way up.
    """

    down: Stages
    middle: tuple[int, int]
    up: Stages

    def __str__(self) -> str:
        def said(stages: Stages) -> str:
            return " ".join("[" + " ".join(map(str, stage)) + "]" for stage in stages)

        return (
            f"down {said(self.down)}, middle {self.middle[0]} ResNet blocks and {self.middle[1]}, up {said(self.up)}"
        )


def layout_of(model: nn.Module) -> UNetLayout:
    """The layout of a dense U-Net."""
    middle = model.mid_block
    depths = _depths(middle) if middle is not None else (0,)
    return UNetLayout(
        down=tuple(_depths(part) for part in model.down_blocks),
        middle=(0, 0) if middle is None else (len(middle.resnets), depths[0]),
        up=tuple(_depths(part) for part in model.up_blocks),
    )


def _depths(part: nn.Module) -> tuple[int, ...]:
    """Transformer blocks behind each ResNet block; 0 where no transformer follows."""
    attentions = getattr(part, "attentions", None)
    attentions = [] if attentions is None else list(attentions)
    attentions += [None] * (len(part.resnets) - len(attentions))
    return tuple(len(getattr(each, "transformer_blocks", ())) for each in attentions[: len(part.resnets)])


def stages(*depths: int | Sequence[int], layers: int) -> Stages:
    """One entry for each stage: a number for all of its layers, or a number for each."""
    return tuple((each,) * layers if isinstance(each, int) else tuple(each) for each in depths)


SD = UNetLayout(down=stages(1, 1, 1, 0, layers=2), middle=(2, 1), up=stages(0, 1, 1, 1, layers=3))
SDXL = UNetLayout(down=stages(0, 2, 10, layers=2), middle=(2, 10), up=stages(10, 2, 0, layers=3))
