"""Checks of the fields of token methods, their form in JSON, and the files that hold it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from genprune.errors import GenpruneError, PlanMismatch, nearest
from genprune.files import whole_file


def check_choice(field: str, value: Any, known: Iterable[str]) -> None:
    known = tuple(known)
    if value not in known:
        raise GenpruneError(
            f"{field}={value!r}{nearest(str(value), known)}; expected one of {', '.join(known)}. Pass one of these."
        )


def check_whole(field: str, value: Any, least: int) -> None:
    if not _whole(value) or value < least:
        raise GenpruneError(f"{field}={value!r}; expected a whole number from {least}. Pass {field}={max(least, 1)}.")


def check_share(field: str, value: Any, *, zero: bool) -> None:
    """A number up to 1, from 0 (`zero`) or above it."""
    if not _number(value) or not 0 <= value <= 1 or (value == 0 and not zero):
        raise GenpruneError(
            f"{field}={value!r}; expected a share in {'[' if zero else '('}0, 1]. Pass a number such as {field}=0.5."
        )


def check_positive(field: str, value: Any) -> None:
    if not _number(value) or not 0 < value < math.inf:
        raise GenpruneError(f"{field}={value!r}; expected a number above 0. Pass {field}=1.0.")


def check_steps(steps: Any) -> None:
    """A number of steps >= 1, or three of them."""
    three = isinstance(steps, tuple | list) and len(steps) == 3
    if not all(_whole(step) and step >= 1 for step in (steps if three else [steps])):
        raise GenpruneError(
            f"steps={steps!r}; expected a whole number from 1, or three of them (first quarter, middle half, last "
            "quarter of the layers). Pass steps=(5, 5, 1)."
        )


def checked_layers(keep: Mapping) -> dict[int, float | int]:
    """`{layer: share or count}` in the order of the layers, a copy."""
    for layer, value in keep.items():
        count = _whole(value) and value >= 1
        share = isinstance(value, float) and 0 < value <= 1
        if not (_whole(layer) and layer >= 0 and (count or share)):
            raise GenpruneError(
                f"keep={{{layer!r}: {value!r}}}; expected layers from 0 with a share in (0, 1] (float) or a count of "
                "patches from 1 (int). Pass keep={3: 0.9, 6: 120}."
            )
    if not keep:
        raise GenpruneError("keep={} names no layer; expected at least one. Pass keep={3: 0.9}, or one share.")
    return {layer: keep[layer] for layer in sorted(keep)}


def checked_numbers(layers: Any) -> tuple[int, ...]:
    """Numbers of layers as a tuple, each once."""
    fits = isinstance(layers, Iterable) and not isinstance(layers, str | Mapping)
    numbers = tuple(layers) if fits else ()
    if not numbers or not all(_whole(layer) and layer >= 0 for layer in numbers) or len(set(numbers)) < len(numbers):
        raise GenpruneError(
            f"layers={layers!r}; expected one or more whole numbers from 0, each once. Pass layers=(2, 5, 8), or None "
            "for the default."
        )
    return numbers


def checked_bounds(bounds: Any) -> tuple[float, float]:
    """Least and most variance of the head filter."""
    pair = tuple(bounds) if isinstance(bounds, tuple | list) else ()
    if len(pair) != 2 or not all(map(_number, pair)) or not 0 <= pair[0] <= pair[1]:
        raise GenpruneError(
            f"head_filter={bounds!r}; expected (least, most) variance, 0 <= least <= most, such as (0.01, 0.7). Pass "
            "None to keep all heads."
        )
    return pair


def as_json(value: Any) -> Any:
    """A field's value as JSON has it: lists for tuples, strings for the layers of a mapping."""
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def from_json(value: Any) -> Any:
    """The reverse of `as_json`."""
    if isinstance(value, Mapping):
        return {_layer(key): item for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _layer(key: Any) -> int:
    try:
        return int(key)
    except (TypeError, ValueError):
        raise GenpruneError(
            f"layer {key!r} in keep; expected a whole number. Write it as in {{'keep': {{'3': 0.9}}}}."
        ) from None


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def write_json(values: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write a JSON file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read_json_text(path: str | os.PathLike, writer: str) -> str:
    """The text of a file that `writer` (named in the message) wrote. Raises `PlanMismatch` where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanMismatch(
            f"'{path}' cannot be read ({error}); expected the JSON file that {writer} writes. Check the path."
        ) from None
