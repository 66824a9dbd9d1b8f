"""Reduce a model's tokens by hooks, and take them off again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from genprune.errors import GenpruneError, UnsupportedModel
from genprune.families import denoiser
from genprune.tokens.costs import TokenCosts, counted
from genprune.tokens.hosts import TokenHost, host_of
from genprune.tokens.methods import TokenMethod
from genprune.tokens.schedule import Counts, explicit, per_layer, solve
from genprune.tokens.state import TokenState


@dataclass(frozen=True)
class TokenReport:
    """What a reduction leaves, at the model's own image size and batch 1.

    Attributes:
        patches: per layer, the patches that it is given.
        macs: per layer, its multiply-accumulates, scoring not included.
        dense_macs, total_macs: of the whole model without and with the reduction, scoring included.
    """

    patches: tuple[int, ...]
    macs: tuple[int, ...]
    dense_macs: int
    total_macs: int

    @property
    def keep(self) -> float:
        """Share of the dense multiply-accumulates."""
        return self.total_macs / self.dense_macs

    def __str__(self) -> str:
        lines = ["layer  patches           MACs"]
        lines += [f"{i:>5}  {n:>7}  {m:>13,}" for i, (n, m) in enumerate(zip(self.patches, self.macs))]
        lines.append(f"model: {self.total_macs:,} of {self.dense_macs:,} MACs, {self.keep:.3f}, scoring included")
        return "\n".join(lines)

    def to_json(self) -> dict:
        return {**dataclasses.asdict(self), "keep": self.keep}


class TokenHandle:
    """The reduction on a model: switch it by `set`, read it by `report()`, take it off by `remove()`.

    Attributes:
        model: the model that the hooks are on.
        method: what decides, as given.
        counts: per layer that reduces, how many patches it hands on at the model's own image size.
    """

    def __init__(self, host: TokenHost, state: TokenState, attached: list):
        self.model, self._host, self._state, self._attached = host.model, host, state, attached
        self._costs: TokenCosts | None = None
        self.counts: Counts = {}

    @property
    def method(self) -> TokenMethod:
        return self._state.method

    @property
    def costs(self) -> TokenCosts:
        """Multiply-accumulates by number of patches; counted once."""
        if self._costs is None:
            self._costs = TokenCosts(self._host)
        return self._costs

    def set(self, **changes) -> TokenHandle:
        """Switch to other settings of the same method, such as `keep=0.5`; no hook is touched.

        A compiled model compiles once for each setting that it meets and keeps what it compiled.

        Raises:
            GenpruneError: an unknown setting or a bad value; the old setting then stays.
        """
        return self._use(self.method.changed(**changes))

    def _use(self, method: TokenMethod) -> TokenHandle:
        self._host.check(method)
        counts = self._planned(method)
        self._state.schedule = per_layer(counts, self._host)
        self._state.method = method
        self.counts = counts
        return self

    def _planned(self, method: TokenMethod) -> Counts:
        if isinstance(method.keep, Mapping):
            return explicit(method.keep, self._host)
        if method.keep is None:
            return dict(enumerate(method.counts(self._host.patches, len(self._host.paths))))
        return solve(method.keep, lambda counts: self.costs.macs(counts, method.placement), self._host, method)

    def report(self) -> TokenReport:
        """Patches and multiply-accumulates of each layer."""
        rows = self.costs.layers(self.counts, self.method.placement)
        total = counted(self._host, self.method, self.counts)[""]
        return TokenReport(
            tuple(patches for patches, _ in rows), tuple(macs for _, macs in rows), self.costs.dense, total
        )

    def remove(self) -> None:
        """Take every hook off; the model is as it was, to the bit. A second call does nothing."""
        for hook in self._attached:
            hook.remove()
        self._attached.clear()

    def __enter__(self) -> TokenHandle:
        return self

    def __exit__(self, *error) -> None:
        self.remove()


def prune_tokens(target, method: TokenMethod) -> TokenHandle:
    """Let a model drop (or merge) tokens while it runs, in place and without training.

    Args:
        target: a timm transformer, a diffusers denoiser, or a pipeline of one.
        method: `ZeroTPrune(keep=0.65)`, `ToMe(r=13)`, ...

    Returns:
        A `TokenHandle`, also a context manager.

    Raises:
        UnsupportedModel: no host file knows the class, or this model has something that stands in the way.
        GenpruneError: tokens of this model are reduced already; a layer does not exist; a budget cannot be met.
    """
    model = denoiser(target)
    if isinstance(model, nn.Module) and reduced(model):
        raise GenpruneError(
            f"tokens of this {type(model).__name__} are reduced already; expected a model without. Call the handle's "
            "set(...) for other settings, or remove() first."
        )
    if not isinstance(method, TokenMethod):
        raise GenpruneError(f"got {method!r}; expected a token method such as genprune.ZeroTPrune(keep=0.65).")
    host = host_of(model)
    state = TokenState(method, len(host.paths))
    handle = TokenHandle(host, state, [])
    handle._use(method)
    handle._attached += host.attach(state)
    if not handle._attached:
        raise UnsupportedModel(f"nothing of this {type(model).__name__} could be hooked; expected blocks.")
    return handle


def reduced(model: nn.Module) -> bool:
    """Whether hooks of a token reduction are on the model."""
    return any(
        isinstance(getattr(getattr(hook, "__self__", None), "state", None), TokenState)
        for module in model.modules()
        for hook in [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    )
