"""The published U-Net shapes: BK-SDM, KOALA, SSD-1B and Vega, and what a dense U-Net loses to become one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from genprune.errors import UnsupportedModel
from genprune.families import host_name
from genprune.operations import replace_op
from genprune.presets.layouts import SD, SDXL, UNetLayout, layout_of, stages

WHICH = ("first", "even")


@dataclass(frozen=True)
class UNetShape:
    """A published shape.

    Args:
        host: the layout that it was cut from, and `host_text` how people call it.
        left: the layout that it has.
        params: of the published U-Net.
        summary: one line about it.
    """

    host: UNetLayout
    host_text: str
    left: UNetLayout
    params: int
    summary: str


_SD, _SDXL = "Stable Diffusion 1.x / 2.x U-Net", "SDXL U-Net"

# KOALA: its model cards write [0, 2, 6] and [0, 2, 5], the outermost stage having no attention.
UNET_SHAPES = {
    "bk-sdm-base": UNetShape(
        SD,
        _SD,
        UNetLayout(stages(1, 1, 1, 0, layers=1), (2, 1), stages(0, 1, 1, 1, layers=2)),
        579_384_964,
        "one layer a stage goes on the way down, and its partner on the way up (BK-SDM, arXiv 2305.15798)",
    ),
    "bk-sdm-small": UNetShape(
        SD,
        _SD,
        UNetLayout(stages(1, 1, 1, 0, layers=1), (0, 0), stages(0, 1, 1, 1, layers=2)),
        482_346_884,
        "as bk-sdm-base, and the middle goes",
    ),
    "bk-sdm-tiny": UNetShape(
        SD,
        _SD,
        UNetLayout(stages(1, 1, 1, layers=1), (0, 0), stages(1, 1, 1, layers=2)),
        323_384_964,
        "as bk-sdm-small, and the innermost stage goes",
    ),
    "koala-1b": UNetShape(
        SDXL,
        _SDXL,
        UNetLayout(stages(0, 2, 6, layers=1), (2, 6), stages(6, 2, 0, layers=2)),
        1_161_184_324,
        "one layer a stage goes, and 4 of 10 transformer blocks of each innermost wrapper (KOALA, arXiv 2312.04005)",
    ),
    "koala-700m": UNetShape(
        SDXL,
        _SDXL,
        UNetLayout(stages(0, 2, 5, layers=1), (0, 0), stages(5, 2, 0, layers=2)),
        782_822_724,
        "one layer a stage and the middle go, and 5 of 10 transformer blocks of each innermost wrapper (KOALA)",
    ),
    "ssd-1b": UNetShape(
        SDXL,
        _SDXL,
        UNetLayout(stages(0, 2, 4, layers=2), (1, 0), stages((4, 4, 10), (2, 1, 1), 0, layers=3)),
        1_331_334_404,
        "36 of 70 transformer blocks, the attention and one ResNet block of the middle go (Segmind SSD-1B)",
    ),
    "vega": UNetShape(
        SDXL,
        _SDXL,
        UNetLayout(stages(0, 1, 2, layers=2), (1, 0), stages(2, 1, 0, layers=3)),
        745_225_604,
        "55 of 70 transformer blocks, the attention and one ResNet block of the middle go (Segmind Vega)",
    ),
}


def check_layout(model: nn.Module, name: str) -> None:
    """Raises `UnsupportedModel` where a model is not the dense U-Net that the shape was cut from."""
    shape = UNET_SHAPES[name]
    found = host_name(model)
    layout = layout_of(model) if found == "UNet2DConditionModel" else None
    if layout == shape.host:
        return
    fitting = [other for other, each in UNET_SHAPES.items() if layout == each.host]
    if found != "UNet2DConditionModel":
        fitting = [] if found == "UNet2DModel" else ["alternate-layers"]
    described = found if layout is None else f"{found} of {layout} transformer blocks"
    other = f"Its own presets: {', '.join(fitting)}." if fitting else "See gp.preset_cards()."
    raise UnsupportedModel(
        f"'{name}' is no shape of this {described}; expected a dense {shape.host_text}: {shape.host} transformer "
        f"blocks. {other}"
    )


def removed_parts(model: nn.Module, shape: UNetShape, which: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Names of the sites that go, and the operations, that turn a dense U-Net into a shape.

    A layer that goes takes its partner on the way up along. Of a stage the first layers stay on the way down, and on
    the way up the first ones and the last, which reads what entered the stage; of the middle its first ResNet block.

    Args:
        model: of the layout `shape.host`.
        which: transformer blocks that stay in a wrapper: its `first`, or `even` ones spread over it.
    """
    host, left = shape.host, shape.left
    total, kept_stages = len(host.down), len(left.down)
    sites, ops = list(_middle(shape, which)), []
    for index in range(total):
        stays = index < kept_stages
        down, up = f"down_blocks.{index}", f"up_blocks.{total - 1 - index}"
        below, above = host.down[index], host.up[total - 1 - index]
        new_below = left.down[index] if stays else ()
        new_above = left.up[kept_stages - 1 - index] if stays else ()
        sites += _layers(down, below, dict(enumerate(new_below)), which)
        last = len(new_above) - 1
        kept = {len(above) - 1 if i == last else i: depth for i, depth in enumerate(new_above)}
        sites += _layers(up, above, kept, which, resnets=False)
        for layer in range(len(above)):
            if layer not in kept:
                path = f"{up}.resnets.{layer}"
                ops.append(replace_op(path, "drop_skip", {"channels": model.get_submodule(path).out_channels}))
        if not stays:
            border = f"down_blocks.{index - 1}.downsamplers.0", f"{up}.upsamplers.0"
            ops += [replace_op(path, "drop_resampler") for path in border]
    return sites, ops


def _middle(shape: UNetShape, which: str) -> Iterator[str]:
    """Sites of the middle that go."""
    (resnets, depth), (left, new_depth) = shape.host.middle, shape.left.middle
    yield from (f"mid_block.resnets.{index}:branch" for index in range(left, resnets))
    yield from _blocks("mid_block.attentions.0", depth, new_depth, which)


def _layers(
    path: str, depths: tuple[int, ...], kept: dict[int, int], which: str, resnets: bool = True
) -> Iterator[str]:
    """Sites of one stage that go; `kept`: layer that stays -> its transformer blocks."""
    for layer, depth in enumerate(depths):
        if resnets and layer not in kept:
            yield f"{path}.resnets.{layer}:branch"
        yield from _blocks(f"{path}.attentions.{layer}", depth, kept.get(layer, 0), which)


def _blocks(wrapper: str, depth: int, left: int, which: str) -> Iterator[str]:
    """The wrapper where none of its transformer blocks stays, otherwise those that go."""
    if depth and not left:
        yield f"{wrapper}:wrapper"
        return
    stay = set(range(left)) if which == "first" else {index * depth // left for index in range(left)}
    yield from (f"{wrapper}.transformer_blocks.{index}:block" for index in range(depth) if index not in stay)
