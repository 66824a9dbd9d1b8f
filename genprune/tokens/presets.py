"""Counts per layer as a file: what a search or a budget found, and published settings, for any model of that depth."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genprune.errors import GenpruneError, PlanMismatch, nearest
from genprune.tokens import checks
from genprune.tokens.diffusion import KIND, DiffusionTokens
from genprune.tokens.hosts import TokenHost
from genprune.tokens.methods import TokenMethod, ZeroTPrune

FORMAT_VERSION = 1


@dataclass(frozen=True)
class TokenPreset:
    """A method with explicit counts, and what the counts were made for.

    Args:
        method: its `keep` maps layers to counts of patches, or to shares of what reaches them.
        patches: of the full grid that the counts are for, without prefix tokens.
        depth: layers of the model.
        model: name of its class, or whatever says more.
        figures: what it was found to cost and do: `macs`, shares, distances.
        source: where it is from: `budget`, `search`, or the publication.
    """

    method: TokenMethod
    patches: int
    depth: int
    model: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.method, TokenMethod) or not isinstance(self.method.keep, Mapping):
            raise GenpruneError(
                f"a preset got {self.method!r}; expected a token method with keep={{layer: count}}. Take "
                "handle.preset(), or write the counts out."
            )
        checks.check_whole("patches", self.patches, 1)
        checks.check_whole("depth", self.depth, 1)

    def fitted(self, host: TokenHost) -> TokenMethod:
        """The method for a model: as it is, or with counts in proportion where the model has another image size.

        Raises:
            PlanMismatch: the model has another number of layers.
        """
        depth = len(host.paths)
        if depth != self.depth:
            raise PlanMismatch(
                f"the preset is for {self.depth} layers ({self.model or 'no model named'}), this "
                f"{type(host.model).__name__} has {depth}. Search one for it with gp.search_tokens(model, images)."
            )
        if host.patches == self.patches:
            return self.method
        keep = {layer: self._scaled(value, host.patches) for layer, value in self.method.keep.items()}
        warnings.warn(
            f"the preset was made for {self.patches} patches, this {type(host.model).__name__} has {host.patches} at "
            f"its image size: counts are taken in proportion, {keep}. Search at this size for better ones.",
            stacklevel=4,
        )
        return self.method.changed(keep=keep)

    def _scaled(self, value: float | int, patches: int) -> float | int:
        return value if isinstance(value, float) else max(1, value * patches // self.patches)

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "preset": "tokens",
            "model": self.model,
            "depth": self.depth,
            "patches": self.patches,
            "source": self.source,
            "figures": dict(self.figures),
            "method": self.method.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TokenPreset:
        """Read what `to_json` gave.

        Raises:
            PlanMismatch: it is something else, incomplete, or of a newer format.
        """
        values = dict(data)
        kind, version = values.pop("preset", None), values.pop("format_version", None)
        known = ("method", "patches", "depth", "model", "figures", "source")
        unknown = [name for name in values if name not in known]
        missing = [name for name in known[:3] if name not in values]
        if kind != "tokens" or not isinstance(version, int) or unknown or missing:
            found = f"unknown {unknown}{nearest(unknown[0], known)}" if unknown else f"missing {missing}"
            raise PlanMismatch(
                f"this is no token preset ({found if kind == 'tokens' else f'preset={kind!r}'}); expected the JSON "
                "that handle.preset().save(path) writes. Save it again."
            )
        if version > FORMAT_VERSION:
            raise PlanMismatch(
                f"the token preset has format {version}, this genprune reads up to {FORMAT_VERSION}. Upgrade with "
                "`pip install -U genprune`."
            )
        return cls(**{**values, "method": TokenMethod.from_json(values["method"])})

    def save(self, path: str | os.PathLike) -> None:
        """Write the preset as a JSON file, whole or not at all."""
        checks.write_json(self.to_json(), path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> TokenPreset:
        """Read what `save` wrote. Raises `PlanMismatch`."""
        found = read(path)
        if not isinstance(found, TokenPreset):
            raise PlanMismatch(
                f"'{path}' holds a method without the size it was made for; expected a preset. Read it with "
                "TokenMethod.load, or pass the path to gp.prune_tokens."
            )
        return found


def read(path: str | os.PathLike) -> TokenPreset | TokenMethod | DiffusionTokens:
    """The preset, the method, or the settings for a denoiser, in a JSON file; or the published preset of that name.

    Raises:
        PlanMismatch: there is no such file or name, or it holds something else.
    """
    if isinstance(path, str) and path in PUBLISHED:
        return PUBLISHED[path]
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise PlanMismatch(
            f"'{path}' cannot be read as JSON ({error}){nearest(str(path), PUBLISHED)}; expected a file that "
            f"handle.preset().save(path) wrote, or one of {', '.join(PUBLISHED)}. Check the path."
        ) from None
    if isinstance(data, dict) and "preset" in data:
        return TokenPreset.from_json(data)
    if isinstance(data, dict) and data.get("kind") == KIND:
        return DiffusionTokens.from_json(data)
    return TokenMethod.from_json(data)


def preset_tokens(name: str) -> TokenPreset:
    """A published setting by name, for comparisons. `token_presets()` lists them.

    Raises:
        GenpruneError: there is none of that name.
    """
    if name not in PUBLISHED:
        raise GenpruneError(
            f"no published token preset {name!r}{nearest(name, PUBLISHED)}; expected one of {', '.join(PUBLISHED)}. "
            "Pass one."
        )
    return PUBLISHED[name]


def token_presets() -> dict[str, TokenPreset]:
    """The published settings by name. None was measured here; image size 224, patches of 16, 12 layers."""
    return dict(PUBLISHED)


def _published(model: str, source: str, keep: Mapping[int, float | int], **settings: Any) -> TokenPreset:
    return TokenPreset(ZeroTPrune.published(keep=keep, **settings), 196, 12, model, {}, f"published: {source}")


_AUTHOR = "an earlier class project of Zero-TPrune's author"
# DiffRate's tokens after the merge of each layer, its class token taken off. Ours are chosen by other scores.
_DIFFRATE = dict(enumerate(n - 1 for n in (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3)))

PUBLISHED: dict[str, TokenPreset] = {
    **{
        f"deit-{name}": _published("DeiT-S, DeiT-B", _AUTHOR, dict(zip((2, 5, 8), rates)))
        for name, rates in {
            ".9-.8-.7": (0.9, 0.8, 0.7),
            ".9": (0.9, 0.9, 0.9),
            ".8": (0.8, 0.8, 0.8),
            ".7": (0.7, 0.7, 0.7),
            ".6": (0.6, 0.6, 0.6),
        }.items()
    },
    "deit-s-gentle": _published(
        "DeiT-S", _AUTHOR, dict(zip(range(2, 11), (0.99, 0.98, 0.99, 0.98, 0.95, 0.9, 0.85, 0.9, 0.85)))
    ),
    "deit-s-aggressive": _published("DeiT-S", _AUTHOR, {0: 0.6, 3: 0.42, 6: 0.5, 9: 0.5}),
    "deit-t-six": _published("DeiT-T", _AUTHOR, dict(zip((2, 5, 8, 9, 10, 11), (0.9, 0.8, 0.9, 0.9, 0.9, 0.9)))),
    "deit-t-six-less": _published("DeiT-T", _AUTHOR, dict(zip((2, 5, 8, 9, 10, 11), (0.8, 0.8, 0.7, 0.7, 0.7, 0.7)))),
    "diffrate-deit-s": _published(
        "DeiT-S at 2.9 G", "DiffRate (arXiv 2305.17997), counts alone", _DIFFRATE, placement="before_mlp"
    ),
}
