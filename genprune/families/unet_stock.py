"""What is left of a U-Net as its stock configuration counts it: transformer blocks, layers, the middle, stages.

Stage `i` of `n` counts from the picture inwards: `down_blocks.i`, and its partner `up_blocks.(n - 1 - i)`. A layer is
a ResNet block and the attention behind it. Each layer on the way up reads one skip: those of its stage in reverse
order, and the last layer what entered the stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from genprune.families import StockExport
from genprune.families.unet_fields import keep_stages, middle_stays, write_depths, write_layers
from genprune.sites import Sites, effective_keep

# Stages whose layers stand in a row, each with its skip, and the same stage without attention.
_WITHOUT_ATTENTION = {
    "DownBlock2D": "DownBlock2D",
    "UpBlock2D": "UpBlock2D",
    "CrossAttnDownBlock2D": "DownBlock2D",
    "CrossAttnUpBlock2D": "UpBlock2D",
    "AttnDownBlock2D": "DownBlock2D",
    "AttnUpBlock2D": "UpBlock2D",
}
_RESNET = re.compile(r"(down_blocks\.\d+|mid_block)\.resnets\.\d+")


class _NotSaid(Exception):
    """No stock configuration says this."""


def unet_stock_config(
    config: Mapping[str, Any],
    model: nn.Module,
    sites: Sites,
    keep: Mapping[str, Tensor],
    ops: Sequence[Mapping[str, Any]] = (),
) -> StockExport | None:
    """The stock configuration of a U-Net that lost whole parts, or None where there is none.

    It can say: transformer blocks gone; layers gone from a stage together with their partners on the way up; all
    attention of a stage, or of the middle, gone; the middle gone; innermost stages gone with their resamplers.

    Args:
        config: of the dense model.
        model, sites, keep, ops: as in `Family.stock_config`.
    """
    try:
        holes = _holes(sites, effective_keep(sites, keep), ops)
        return _Shape(config, model, holes).export() if holes else StockExport(dict(config), {})
    except _NotSaid:
        return None


def _holes(sites: Sites, keep: Mapping[str, Tensor], ops: Iterable[Mapping[str, Any]]) -> set[str]:
    """What went, as `{module path}:{kind of site, or operator}`. Raises `_NotSaid` for what is no whole part."""
    holes = {f"{op['path']}:{op['with']}" for op in ops}
    if any(hole.rpartition(":")[2] not in ("drop_skip", "drop_resampler") for hole in holes):
        raise _NotSaid
    for name in keep:
        site = sites[name]
        if f"{site.path}:drop_skip" in holes:
            continue  # the operator stands for all of this block
        if site.kind not in ("block", "wrapper") and not (site.kind == "branch" and _RESNET.fullmatch(site.path)):
            raise _NotSaid
        holes.add(name)
    return holes


class _Shape:
    """Reads what is left of one U-Net. `said` holds the holes that the configuration accounts for."""

    def __init__(self, config: Mapping[str, Any], model: nn.Module, holes: set[str]):
        self.model, self.holes = model, holes
        self.config = dict(config)
        self.widths = tuple(config["block_out_channels"])
        self.conditional = "transformer_layers_per_block" in config
        self.said: set[str] = set()
        self.moves: dict[str, str | None] = {}  # state-dict prefixes, the most specific first

    def export(self) -> StockExport:
        stages = len(self.widths)
        left = self._stages_left()
        middle = self._middle(left)
        layers, down, up = zip(*(self._stage(index, left) for index in range(left)))
        if self.holes - self.said:
            raise _NotSaid
        for index in range(left, stages):
            self.moves[f"down_blocks.{index}."] = self.moves[f"up_blocks.{stages - 1 - index}."] = None
        keep_stages(self.config, left)
        if not write_layers(self.config, layers):
            raise _NotSaid
        if self.conditional and not write_depths(self.config, down, middle, up):
            raise _NotSaid
        return StockExport(self.config, _needed(self.moves))

    # ---- stages and the middle ----------------------------------------------------------------------------------

    def _stages_left(self) -> int:
        """Stages that stay: innermost ones go as a whole, together with the resamplers at their border."""
        stages = left = len(self.widths)
        while left > 1:
            down, up = f"down_blocks.{left - 1}", f"up_blocks.{stages - left}"
            border = {
                f"down_blocks.{left - 2}.downsamplers.0:drop_resampler",
                f"{up}.upsamplers.0:drop_resampler",
            }
            layers = self._layer_holes(down, self.model.down_blocks[left - 1], "branch")
            layers += self._layer_holes(up, self.model.up_blocks[stages - left], "drop_skip")
            holes = border.union(*layers)
            if not holes <= self.holes:
                return left
            if self.widths[left - 2] != self.widths[left - 1]:
                raise _NotSaid  # a removed layer keeps its width
            self._check_types(left - 1)
            self.said |= holes
            left -= 1
            self.moves[f"down_blocks.{left - 1}.downsamplers."] = None
        return left

    def _middle(self, left: int) -> int | None:
        """Transformer blocks left in the middle; None where it has none, or is gone."""
        part = self.model.mid_block
        if part is None:
            return None
        attentions = [index for index, each in enumerate(_attentions(part)) if each is not None]
        wrappers = {f"mid_block.attentions.{index}:wrapper" for index in attentions}
        resnets = [f"mid_block.resnets.{index}:branch" for index in range(len(part.resnets))]
        gone = [name in self.holes for name in resnets]
        whole = wrappers.union(resnets) <= self.holes
        if not whole and not middle_stays(self.config, left):
            raise _NotSaid
        if not any(gone) and not (wrappers & self.holes):
            depths = [self._blocks("mid_block", part, i, f"mid_block.attentions.{i}") for i in attentions]
            return depths[0] if depths else None
        if self.config.get("mid_block_scale_factor", 1) != 1 or (wrappers and not wrappers <= self.holes):
            raise _NotSaid  # what stays divides by the factor
        if whole:
            self.config["mid_block_type"] = self.moves["mid_block."] = None
        elif self.config.get("mid_block_type") == "UNetMidBlock2DCrossAttn" and gone.count(False) == 1:
            self.config["mid_block_type"] = "UNetMidBlock2D"  # one ResNet block alone
            self.moves |= {
                f"mid_block.resnets.{i}.": None if g else "mid_block.resnets.0." for i, g in enumerate(gone)
            }
            self.moves["mid_block.attentions."] = None
        elif not self.conditional and not any(gone):
            self.config["add_attention"] = False
            self.moves["mid_block.attentions."] = None
        else:
            raise _NotSaid
        self.said |= wrappers | {name for name in resnets if name in self.holes}
        return None

    # ---- layers -------------------------------------------------------------------------------------------------

    def _stage(self, index: int, left: int) -> tuple[int, list[int] | None, list[int] | None]:
        """Layers left in a stage that stays, and the transformer blocks of each on the way down and up."""
        mirror = len(self.widths) - 1 - index
        down, up = f"down_blocks.{index}", f"up_blocks.{mirror}"
        below, above = self.model.down_blocks[index], self.model.up_blocks[mirror]
        gone_down, gone_up = self._gone(down, below, "branch"), self._gone(up, above, "drop_skip")
        if any(gone_down) or any(gone_up):
            self._check_types(index)
            self._check_skips(index, gone_down, gone_up)
        return (
            gone_down.count(False),
            self._depths(down, below, gone_down, down),
            self._depths(up, above, gone_up, f"up_blocks.{left - 1 - index}"),
        )

    def _layer_holes(self, path: str, part: nn.Module, kind: str) -> list[set[str]]:
        """For each layer of a stage the holes that it leaves when it goes."""
        attentions = _attentions(part)
        return [
            {f"{path}.resnets.{index}:{kind}"}
            | ({f"{path}.attentions.{index}:wrapper"} if index < len(attentions) else set())
            for index in range(len(part.resnets))
        ]

    def _gone(self, path: str, part: nn.Module, kind: str) -> list[bool]:
        """For each layer of a stage whether it went."""
        gone = []
        for index, holes in enumerate(self._layer_holes(path, part, kind)):
            gone.append(f"{path}.resnets.{index}:{kind}" in self.holes)
            if gone[-1]:
                self.said |= holes & self.holes
                if not holes <= self.holes:
                    raise _NotSaid  # an attention without its ResNet block
        return gone

    def _check_types(self, index: int) -> None:
        upwards = len(self.widths) - 1 - index
        types = self.config["down_block_types"][index], self.config["up_block_types"][upwards]
        if any(name not in _WITHOUT_ATTENTION for name in types):
            raise _NotSaid

    def _check_skips(self, index: int, gone_down: list[bool], gone_up: list[bool]) -> None:
        """What stays on the way up must read the skips of the shorter stage, in its order."""
        if all(gone_down) or (gone_down[0] and self.widths[max(index - 1, 0)] != self.widths[index]):
            raise _NotSaid
        if gone_up[0] and self.widths[min(index + 1, len(self.widths) - 1)] != self.widths[index]:
            raise _NotSaid
        # A removed layer hands its input on: its skip is that of the layer before it; -1 is what entered the stage.
        skips, last = [-1], -1
        for is_gone in gone_down:
            last += not is_gone
            skips.append(last)
        read = [skip for skip, is_gone in zip(reversed(skips), gone_up) if not is_gone]
        if read != list(range(last, -2, -1)):
            raise _NotSaid

    def _depths(self, path: str, part: nn.Module, gone: list[bool], new: str) -> list[int] | None:
        """Transformer blocks of each layer that stays; None where the stage has no attention, or lost all of it."""
        attentions = _attentions(part)
        kept = [index for index, is_gone in enumerate(gone) if not is_gone]
        wrappers = {f"{path}.attentions.{index}:wrapper" for index in kept if attentions}
        bare = bool(wrappers) and wrappers <= self.holes
        if bare:
            self._drop_attention(path)
            self.said |= wrappers
        depths = []
        for index, is_gone in enumerate(gone):
            target = None if is_gone else kept.index(index)
            if attentions and not is_gone and not bare:
                depths.append(self._blocks(path, part, index, f"{new}.attentions.{target}"))
            for name in ("resnets", "attentions"):
                stays = target is not None and not (bare and name == "attentions")
                self.moves[f"{path}.{name}.{index}."] = f"{new}.{name}.{target}." if stays else None
        self.moves[f"{path}."] = f"{new}."
        return None if None in depths or not depths else depths

    def _drop_attention(self, path: str) -> None:
        """A stage without any attention is one of another type."""
        way, place = path.split("_blocks.")
        types, place = f"{way}_block_types", int(place)
        names = list(self.config[types])
        resamples_otherwise = any(self.config.get(f"{way}sample_type", "conv") != "conv" for way in ("down", "up"))
        if names[place] not in _WITHOUT_ATTENTION or resamples_otherwise:
            raise _NotSaid
        names[place] = _WITHOUT_ATTENTION[names[place]]
        self.config[types] = names

    def _blocks(self, path: str, part: nn.Module, index: int, new: str) -> int | None:
        """Transformer blocks left in one wrapper; None for an attention without any."""
        blocks = getattr(_attentions(part)[index], "transformer_blocks", None)
        if blocks is None:
            return None
        old, left = f"{path}.attentions.{index}.transformer_blocks", 0
        for block in range(len(blocks)):
            is_gone = f"{old}.{block}:block" in self.holes
            if is_gone:
                self.said.add(f"{old}.{block}:block")
            self.moves[f"{old}.{block}."] = None if is_gone else f"{new}.transformer_blocks.{left}."
            left += not is_gone
        return left


def _attentions(part: nn.Module) -> Sequence[nn.Module | None]:
    attentions = getattr(part, "attentions", None)
    return () if attentions is None else list(attentions)


def _needed(moves: Mapping[str, str | None]) -> dict[str, str | None]:
    """The prefixes that say something that no more general one behind them says."""
    needed: dict[str, str | None] = {}
    for old, new in reversed(moves.items()):
        if StockExport({}, needed).renamed(old) != new:
            needed = {old: new, **needed}
    return needed
