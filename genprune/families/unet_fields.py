"""The fields of a U-Net's configuration that count stages, layers and transformer blocks. Plain data, no models.

All lists here go from the picture inwards. A field with one entry for each stage may also be a single value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BY_STAGE = (
    "block_out_channels",
    "down_block_types",
    "layers_per_block",
    "transformer_layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "only_cross_attention",
)
_BY_STAGE_OUTWARDS = ("up_block_types", "reverse_transformer_layers_per_block")
_READ_BY_MIDDLE = ("attention_head_dim", "num_attention_heads", "cross_attention_dim")

Depths = Sequence[Sequence[int] | None]  # for each stage the transformer blocks of each layer; None without attention


def is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def keep_stages(config: dict[str, Any], left: int) -> None:
    """Keep the outer `left` stages, in place."""
    gone = len(config["block_out_channels"]) - left
    if not gone:
        return
    for field in _BY_STAGE:
        if is_list(config.get(field)):
            config[field] = config[field][:left]
    for field in _BY_STAGE_OUTWARDS:
        if is_list(config.get(field)):
            config[field] = config[field][gone:]


def middle_stays(config: dict[str, Any], left: int) -> bool:
    """Whether the middle, which reads the entries of the last stage, is the same with the outer `left` stages."""
    lists = [config[field] for field in _READ_BY_MIDDLE if is_list(config.get(field))]
    return all(each[-1] == each[left - 1] for each in lists)


def write_layers(config: dict[str, Any], layers: Sequence[int]) -> bool:
    """Write the layers of each stage, in place; False where the host has one number for all stages."""
    given = config["layers_per_block"]
    if list(layers) == (list(given) if is_list(given) else [given] * len(layers)):
        return True
    if len(set(layers)) > 1 and "transformer_layers_per_block" not in config:  # `UNet2DModel`
        return False
    config["layers_per_block"] = layers[0] if len(set(layers)) == 1 else list(layers)
    return True


def write_depths(config: dict[str, Any], down: Depths, middle: int | None, up: Depths) -> bool:
    """Write the transformer blocks of each wrapper, in place: one number where all of a stage have as many.

    Args:
        middle: blocks of the middle. The host takes them from the last stage, of which a list gives its first number.

    Returns:
        False where the middle needs another number than the last stage gives.
    """
    given = config["transformer_layers_per_block"]
    found = [{*(below or ()), *(above or ())} for below, above in zip(down, up)]
    if middle is not None:
        found[-1].add(middle)
    if all(len(numbers) <= 1 for numbers in found):
        before = list(given) if is_list(given) else [given] * len(found)
        before = [number if isinstance(number, int) else 1 for number in before]
        depths = [next(iter(numbers), number) for numbers, number in zip(found, before)]
        single = not is_list(given) and len(set(depths)) == 1
        config["transformer_layers_per_block"] = depths[0] if single else depths
        config["reverse_transformer_layers_per_block"] = None
        return True
    # 1, which nobody reads, where a stage has no wrappers
    below = [list(depths) if depths else 1 for depths in down]
    if middle is not None and not down[-1]:
        below[-1] = [middle]
    elif middle is not None and down[-1][0] != middle:
        return False
    config["transformer_layers_per_block"] = below
    config["reverse_transformer_layers_per_block"] = [list(depths) if depths else 1 for depths in reversed(up)]
    return True
