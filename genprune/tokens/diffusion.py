"""How a token method is used along a chain of denoising steps."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from genprune.errors import GenpruneError, nearest
from genprune.tokens import checks
from genprune.tokens.methods import TokenMethod, ZeroTPrune

FORMAT_VERSION = 1
KIND = "diffusion_tokens"
RESTORES = ("update", "own", "nearest", "zeros")


@dataclass(frozen=True)
class DiffusionTokens:
    """Token reduction in a denoiser: image tokens leave, and are back before the picture is put together.

    Of the method, `placement` and `proportional` have no effect here: denoisers are reduced around whole blocks (or
    attentions), and their attention takes no bias.

    Args:
        method: what decides which tokens go. Its `keep` is a share of the denoiser's MACs in a step that scores; or
            `{layer: share or count}`, where the layers of a U-Net are its levels of resolution, 0 the finest.
        tokens: share of the image tokens, in (0, 1], that are left wherever tokens are reduced; in place of `keep`.
        around: what runs on fewer tokens in a U-Net: each whole transformer `block`, or its self-`attention` alone.
            Transformers without levels always reduce blocks.
        restore: how a removed token comes back. `update`: its own value, plus what the reduced part changed in the
            most similar token that stayed. `own`: as it was. `nearest`: a copy of that most similar token. `zeros`.
        early: `((share of the chain, factor), ...)`: in that first share of it only `factor` of the tokens that
            would be removed are. `((0.25, 0.5), (0.5, 0.8))`: half of them in the first quarter, 80 % in the second.
            The place in the chain is read off the timestep: 1 - timestep / the first timestep of this chain.
        every: tokens are scored in every so many steps, and the choice is kept in between.
        guidance: whether rows of a batch that show the same latents (classifier-free guidance) share one choice.
            `auto`: rows i and i + B/2 (or thirds) where they are equal, and the second of two calls with the same
            latents takes the choice of the first; inside a compiled graph, where nothing can be looked at: none.
            `shared`: two halves, without looking. `apart`: every row for itself.
        operating_point: where MACs are counted, such as `{"height": 64, "width": 64}` in latent pixels; the rest is
            the family's default. None: all of it.

    Reference:
        Fewer tokens pruned in early steps: AT-EDM (arXiv 2405.05252). Merge, attend, un-merge: Token Merging for
        Fast Stable Diffusion (arXiv 2303.17604), `around="attention"`, `restore="update"`.
    """

    method: TokenMethod = field(default_factory=ZeroTPrune)
    tokens: float | None = None
    around: str = "block"
    restore: str = "update"
    early: tuple[tuple[float, float], ...] = ()
    every: int = 1
    guidance: str = "auto"
    operating_point: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, TokenMethod):
            raise GenpruneError(
                f"method={self.method!r}; expected a token method. Pass gp.DiffusionTokens(gp.ZeroTPrune(keep=0.75))."
            )
        if self.tokens is not None:
            checks.check_share("tokens", self.tokens, zero=False)
        checks.check_choice("around", self.around, ("block", "attention"))
        checks.check_choice("restore", self.restore, RESTORES)
        checks.check_choice("guidance", self.guidance, ("auto", "shared", "apart"))
        checks.check_whole("every", self.every, 1)
        object.__setattr__(self, "early", _checked_early(self.early))
        if self.operating_point is not None:
            if not isinstance(self.operating_point, Mapping):
                raise GenpruneError(
                    f"operating_point={self.operating_point!r}; expected names with numbers. Pass "
                    "operating_point={'height': 64, 'width': 64}."
                )
            object.__setattr__(self, "operating_point", dict(self.operating_point))

    @property
    def counts_steps(self) -> bool:
        """Whether the place in the chain matters, so that every call's timestep is read."""
        return self.every > 1 or bool(self.early)

    def factor_at(self, place: float) -> float:
        """Which share of the removed tokens is removed at a place in the chain, 0 (noise) to 1 (picture)."""
        return next((factor for share, factor in self.early if place < share), 1.0)

    def changed(self, **changes: Any) -> DiffusionTokens:
        """A copy with other values, of its own fields or of the method's.

        Raises:
            GenpruneError: an unknown name, or a value out of range.
        """
        own = [item.name for item in dataclasses.fields(self)]
        methods = [item.name for item in dataclasses.fields(self.method)]
        for name in changes:
            if name not in own and name not in methods:
                raise GenpruneError(
                    f"there is no setting '{name}'{nearest(name, own + methods)}; expected one of "
                    f"{', '.join(own)}, or of {type(self.method).__name__}: {', '.join(methods)}."
                )
        mine = {name: value for name, value in changes.items() if name in own}
        others = {name: value for name, value in changes.items() if name not in own}
        if others:
            mine["method"] = mine.get("method", self.method).changed(**others)
            if "keep" in others:
                mine.setdefault("tokens", None)
        return dataclasses.replace(self, **mine)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; `DiffusionTokens.from_json` reads it."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        values |= {"method": self.method.to_json(), "early": [list(pair) for pair in self.early]}
        return {"format_version": FORMAT_VERSION, "kind": KIND, **values}

    @classmethod
    def from_json(cls, data: str | Mapping[str, Any]) -> DiffusionTokens:
        """Read what `to_json` gave, as a dictionary or as text.

        Raises:
            GenpruneError: other JSON, an unknown key, a newer format, or a value out of range.
        """
        try:
            values = dict(json.loads(data) if isinstance(data, str) else data)
            kind, version = values.pop("kind"), int(values.pop("format_version"))
            values["method"] = TokenMethod.from_json(values["method"])
            values["early"] = tuple(tuple(pair) for pair in values.get("early", ()))
        except (TypeError, ValueError, KeyError) as error:
            if isinstance(error, GenpruneError):
                raise
            raise GenpruneError(
                f"these are no diffusion token settings ({error}); expected an object with 'kind', 'method' and "
                "'format_version', as DiffusionTokens.to_json() gives."
            ) from None
        if kind != KIND or version > FORMAT_VERSION:
            raise GenpruneError(
                f"kind '{kind}', format {version}; expected '{KIND}' up to format {FORMAT_VERSION}. Check the file, "
                "or upgrade with `pip install -U genprune`."
            )
        return cls().changed(**values)

    def save(self, path: str | os.PathLike) -> None:
        """Write the settings as a JSON file."""
        checks.write_json(self.to_json(), path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> DiffusionTokens:
        """Read what `save` wrote. Raises `PlanMismatch` where there is no such text, else see `from_json`."""
        return cls.from_json(checks.read_json_text(path, "settings.save"))


def _checked_early(early: Any) -> tuple[tuple[float, float], ...]:
    try:
        pairs = tuple((float(share), float(factor)) for share, factor in early)
    except (TypeError, ValueError):
        pairs = ((-1.0, -1.0),)
    rising = all(a[0] < b[0] for a, b in zip(pairs, pairs[1:]))
    if not rising or not all(0 < share <= 1 and 0 <= factor <= 1 for share, factor in pairs):
        raise GenpruneError(
            f"early={early!r}; expected pairs (share of the chain in (0, 1], factor in [0, 1]) with rising shares. "
            "Pass early=((0.25, 0.5),): in the first quarter of the chain half as many tokens go."
        )
    return pairs
