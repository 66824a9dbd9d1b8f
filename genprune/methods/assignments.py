"""Settings of a method as text, `name=value`, read by the types of its fields: what `--set` takes."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable
from typing import Any

from genprune.errors import GenpruneError, nearest
from genprune.methods.base import Method

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", types.NoneType: "none"}
# a text is tried as each of a field's types in this order: what reads as a number is one
_ORDER = (types.NoneType, bool, int, float, tuple, str)


def assigned(method: Method, texts: Iterable[str], flags: Iterable[str] = ()) -> dict[str, Any]:
    """Field name -> value, from `name=value` texts; `method.changed(**values)` takes them.

    Tuples are values with commas (`kinds=heads,neurons`), pairs have a colon (`learning_rates=neurons:0.1`).

    Args:
        method: what the settings are for.
        texts: such as `train_steps=50`. A name that comes twice takes its last value.
        flags: names that are not set this way, because the command has an option `--{name}`.

    Raises:
        GenpruneError: no `=`, an unknown name (with the nearest one), or a value of another type.
    """
    hints = typing.get_type_hints(type(method))
    known = [field.name for field in dataclasses.fields(method)]
    values = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not value:
            raise GenpruneError(f"--set {text!r} is no setting; expected NAME=VALUE. Pass e.g. --set seed=1.")
        if name in flags:
            raise GenpruneError(f"--set {text!r} names what has an option of its own. Pass --{name} {value} instead.")
        if name not in known:
            settable = [each for each in known if each not in flags]
            raise GenpruneError(
                f"{type(method).__name__} has no '{name}'{nearest(name, settable)}; expected {', '.join(settable)}."
            )
        try:
            values[name] = _read(value, hints[name])
        except ValueError:
            default = _text(getattr(method, name))
            raise GenpruneError(
                f"--set {text!r} is no value for {name}; expected {_described(hints[name])}. "
                + (f"The default is --set {name}={default}." if default else "The default is to leave it out.")
            ) from None
    return values


def _read(text: str, hint: Any) -> Any:
    """The text as a value of the type. Raises `ValueError`."""
    for kind in sorted(_members(hint), key=lambda kind: _ORDER.index(typing.get_origin(kind) or kind)):
        try:
            return _read_as(text, kind)
        except ValueError:
            continue
    raise ValueError(text)


def _read_as(text: str, kind: Any) -> Any:
    if kind is types.NoneType:
        if text.lower() == "none":
            return None
        raise ValueError(text)
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ValueError(text)
    if typing.get_origin(kind) is not tuple:
        return kind(text)
    items = [item.strip() for item in text.split(",") if item.strip()]
    inner = typing.get_args(kind)
    if inner[-1] is Ellipsis:
        return tuple(_read_item(item, inner[0]) for item in items)
    if len(items) != len(inner):
        raise ValueError(text)
    return tuple(_read(item, each) for item, each in zip(items, inner))


def _read_item(text: str, hint: Any) -> Any:
    """An item of a tuple; a pair such as `neurons:0.1` where the items are tuples themselves."""
    if typing.get_origin(hint) is tuple:
        return _read_as(text.replace(":", ","), hint)
    return _read(text, hint)


def _members(hint: Any) -> tuple:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _described(hint: Any) -> str:
    return " or ".join(_word(kind) for kind in _members(hint))


def _word(kind: Any) -> str:
    if typing.get_origin(kind) is not tuple:
        return _WORDS[kind]
    inner = typing.get_args(kind)
    if typing.get_origin(inner[0]) is tuple:
        return "NAME:VALUE pairs with commas between them"
    return f"{len(inner)} values with a comma" if inner[-1] is not Ellipsis else "values with commas between them"


def _text(value: Any) -> str:
    """A value as `assigned` reads it."""
    if isinstance(value, tuple):
        return ",".join(":".join(map(str, item)) if isinstance(item, tuple) else str(item) for item in value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
