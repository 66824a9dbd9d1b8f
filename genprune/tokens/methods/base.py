"""What every method of token reduction has: its settings, its form in JSON, and how it is asked."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from genprune.errors import GenpruneError, nearest
from genprune.tokens import checks
from genprune.tokens.choice import Choice, LayerView, check_count
from genprune.tokens.reducing import REDUCTIONS, RESTORES

FORMAT_VERSION = 1
METHODS = {"zero_tprune": "ZeroTPrune", "tome": "ToMe"}  # module of this package -> its class


@dataclass(frozen=True)
class TokenMethod:
    """What every method of token reduction has: how much stays, where, and what becomes of the rest. Use a subclass.

    Args:
        keep: a share of the model's cost, in (0, 1]; or `{layer: share of its patches in (0, 1] (float: the count is
            int(n * share)) or count >= 1 (int)}`.
        of: what one share is a share of, `macs` or `latency`.
        layers: where to reduce when `keep` is one share, 0-based. None: the host's default.
        reduce: `drop`, `merge` (into the most similar kept token) or `mlerp` (the same, keeping norms); `auto`: merge
            where the host can weigh merged tokens, else drop.
        placement: `after_block`, or `before_mlp` of the same block (cheaper per removed token); `auto`: before_mlp
            where the host's blocks run attention and MLP one after the other.
        proportional: after merges, add log(size) to the attention logits. No effect where tokens are dropped.
        restore: how a removed token comes back where a full grid is needed: a copy of the `nearest` kept token, its
            `own` value when it was removed, or `zeros`.
    """

    keep: float | Mapping[int, float | int] | None = 0.65
    of: str = "macs"
    layers: tuple[int, ...] | None = None
    reduce: str = "drop"
    placement: str = "after_block"
    proportional: bool = False
    restore: str = "own"

    name: ClassVar[str] = ""
    fall: ClassVar[str] = "rate"  # how counts fall for a budget: by one rate, or by one `count` per layer
    spacing: ClassVar[int] = 2  # which layers reduce when counts fall by count and none are named: every so many

    def __post_init__(self) -> None:
        if isinstance(self.keep, Mapping):
            object.__setattr__(self, "keep", checks.checked_layers(self.keep))
        elif self.keep is not None:
            checks.check_share("keep", self.keep, zero=False)
        if self.layers is not None:
            object.__setattr__(self, "layers", checks.checked_numbers(self.layers))
        checks.check_choice("of", self.of, ("macs", "latency"))
        checks.check_choice("reduce", self.reduce, ("auto", *REDUCTIONS))
        checks.check_choice("placement", self.placement, ("auto", "after_block", "before_mlp"))
        checks.check_choice("restore", self.restore, RESTORES)

    def choose(self, q: Tensor, k: Tensor, keep: int, view: LayerView) -> Choice:
        """Which patches stay after a layer. Deterministic, without gradients, in float32 or wider.

        Args:
            q, k: queries and keys of the layer after norms and rotary embedding, shape `(B, H, N, d)`, of which the
                first `view.prefix` tokens are the prefix, and n = N - prefix are patches.
            keep: patches that stay, 1 to n.
            view: what the layer is.

        Returns:
            Indices of shape `(B, keep)`; targets where they are merged into something or `view` asks for them.

        Raises:
            GenpruneError: `keep` is out of range, or the method needs a class token that there is not.
        """
        patches = k.shape[2] - view.prefix
        check_count(keep, patches)
        if keep == patches:
            kept = torch.arange(patches, device=k.device).expand(k.shape[0], patches)
            return Choice(kept, kept if self._wants_target(view) else None)
        with torch.no_grad(), _full_precision(k.device.type):
            return self._chosen(q, k, keep, view)

    def _chosen(self, q: Tensor, k: Tensor, keep: int, view: LayerView) -> Choice:
        raise NotImplementedError

    def _wants_target(self, view: LayerView) -> bool:
        return view.wants_target or self.reduce != "drop"

    def settled(self, merges: bool, before_mlp: bool) -> TokenMethod:
        """The method with `auto` decided for a host that can merge, and reduce before the MLP, or cannot."""
        reduce = ("merge" if merges else "drop") if self.reduce == "auto" else self.reduce
        placement = ("before_mlp" if before_mlp else "after_block") if self.placement == "auto" else self.placement
        return dataclasses.replace(self, reduce=reduce, placement=placement)

    def changed(self, **changes: Any) -> TokenMethod:
        """A copy with other values. Raises `GenpruneError` for an unknown name or a value out of range."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise GenpruneError(
                    f"{type(self).__name__} has no '{name}'{nearest(name, known)}; expected {', '.join(known)}."
                )
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; `TokenMethod.from_json` reads it."""
        values = {field.name: checks.as_json(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"format_version": FORMAT_VERSION, "method": self.name, **values}

    @classmethod
    def from_json(cls, data: str | Mapping[str, Any]) -> TokenMethod:
        """Read what `to_json` gave, as a dictionary or as text: the class that its `method` names.

        Raises:
            GenpruneError: no JSON object, another method than this class, an unknown key, a newer format, or a value
                out of range.
        """
        try:
            values = dict(json.loads(data) if isinstance(data, str) else data)
            name, version = values.pop("method"), int(values.pop("format_version"))
        except (TypeError, ValueError, KeyError) as error:
            raise GenpruneError(
                f"this is no token method in JSON ({error}); expected an object with 'method' and 'format_version', "
                "as method.to_json() gives."
            ) from None
        if version > FORMAT_VERSION:
            raise GenpruneError(
                f"the token method has format {version}, this genprune reads up to {FORMAT_VERSION}. Upgrade with "
                "`pip install -U genprune`."
            )
        known = {method.name: method for method in _named() if issubclass(method, cls)}
        if not isinstance(name, str) or name not in known:
            raise GenpruneError(
                f"token method {name!r}{nearest(str(name), known)}; expected one of {', '.join(known)}. Read any of "
                "them with TokenMethod.from_json."
            )
        return known[name]().changed(**{key: checks.from_json(value) for key, value in values.items()})

    def save(self, path: str | os.PathLike) -> None:
        """Write the method as a JSON file."""
        checks.write_json(self.to_json(), path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> TokenMethod:
        """Read what `save` wrote. Raises `PlanMismatch` where there is no such text, else see `from_json`."""
        return cls.from_json(checks.read_json_text(path, "method.save"))


def _named() -> list[type[TokenMethod]]:
    """The methods that a file can name."""
    return [getattr(importlib.import_module(f"genprune.tokens.methods.{at}"), name) for at, name in METHODS.items()]


def _full_precision(device: str) -> contextlib.AbstractContextManager:
    """Autocast would run the products of float32 scores in half precision."""
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
