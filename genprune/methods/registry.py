"""The methods by name, as cards and as JSON. A new method is one file beside this one and one entry below."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from genprune.errors import GenpruneError, nearest
from genprune.methods.base import FORMAT_VERSION, Method
from genprune.methods.ecodiff import EcoDiff
from genprune.methods.layers import FinerCut, LaptopDiff
from genprune.methods.ld_pruner import LDPruner
from genprune.methods.obs import OBS
from genprune.methods.simple import Magnitude, Random
from genprune.methods.taylor import Taylor
from genprune.methods.tiny_fusion import TinyFusion

_METHODS: dict[str, type[Method]] = {
    cls.name: cls for cls in (Random, Magnitude, Taylor, OBS, EcoDiff, LaptopDiff, LDPruner, FinerCut, TinyFusion)
}


@dataclass(frozen=True)
class MethodCard:
    """One line of `genprune methods`."""

    name: str
    needs: tuple[str, ...]
    summary: str


def methods() -> tuple[MethodCard, ...]:
    """The methods by name: what each needs, and one line about it."""
    cards = []
    for name, method in _METHODS.items():
        facts = method.facts()
        cards.append(MethodCard(name, facts.needs, facts.summary))
    return tuple(cards)


def method_named(name: str, **settings: Any) -> Method:
    """A method by its name, with settings. Raises `GenpruneError` for an unknown name or setting."""
    if name not in _METHODS:
        raise GenpruneError(f"no method '{name}'{nearest(name, _METHODS)}; expected one of {', '.join(_METHODS)}.")
    return _METHODS[name]().changed(**settings)


def method_from_json(data: str | Mapping[str, Any]) -> Method:
    """Read what `Method.to_json` gave, as a dictionary or as text.

    Raises:
        GenpruneError: no JSON object, an unknown method or key, a newer format, or a value out of range.
    """
    try:
        data = dict(json.loads(data) if isinstance(data, str) else data)
        name, version = data.pop("method"), int(data.pop("format_version"))
    except (TypeError, ValueError, KeyError) as error:
        raise GenpruneError(
            f"this is no method in JSON ({error}); expected an object with 'method' and 'format_version', as "
            "method.to_json() gives."
        ) from None
    if version > FORMAT_VERSION:
        raise GenpruneError(
            f"the method has format {version}, this genprune reads up to {FORMAT_VERSION}. Upgrade with "
            "`pip install -U genprune`."
        )
    return method_named(name, **data)
