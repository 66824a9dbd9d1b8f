"""Reduce a model's tokens by hooks, and take them off again."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from torch import nn

from genprune.errors import GenpruneError, UnsupportedModel
from genprune.families import denoiser
from genprune.tokens.attached import found_on, reduced, told_compilers
from genprune.tokens.budgets import Budgets, Measured, Planned
from genprune.tokens.costs import TokenCosts, counted
from genprune.tokens.diffusion import DiffusionTokens
from genprune.tokens.hosts import TokenHost, host_of
from genprune.tokens.latency import Timing
from genprune.tokens.methods import TokenMethod
from genprune.tokens.presets import TokenPreset, read
from genprune.tokens.schedule import Counts, per_layer
from genprune.tokens.state import TokenState


@dataclass(frozen=True)
class TokenReport:
    """What a reduction leaves, at the model's own image size and batch 1.

    Attributes:
        patches: per layer, the patches that it is given.
        macs: per layer, its multiply-accumulates, scoring not included.
        dense_macs, total_macs: of the whole model without and with the reduction, scoring included.
        scoring_macs: what choosing takes of it.
        asked: the budget, a share of `of`; None where counts were written out.
        of: what it is a share of, `macs` or `latency`.
        measured: share of the dense time, for a budget of latency.
    """

    patches: tuple[int, ...]
    macs: tuple[int, ...]
    dense_macs: int
    total_macs: int
    scoring_macs: int = 0
    asked: float | None = None
    of: str = "macs"
    measured: Measured | None = None

    @property
    def keep(self) -> float:
        """Share of the dense multiply-accumulates."""
        return self.total_macs / self.dense_macs

    @property
    def miss(self) -> float | None:
        """Reached minus asked; None where nothing was asked."""
        if self.asked is None:
            return None
        return (self.measured.share if self.of == "latency" and self.measured else self.keep) - self.asked

    def __str__(self) -> str:
        lines = ["layer  patches           MACs"]
        lines += [f"{i:>5}  {n:>7}  {m:>13,}" for i, (n, m) in enumerate(zip(self.patches, self.macs))]
        lines.append(f"model: {self.total_macs:,} of {self.dense_macs:,} MACs, {self.keep:.4f}, scoring included")
        lines.append(f"scoring: {self.scoring_macs:,} MACs")
        if self.measured is not None:
            took = self.measured
            lines.append(
                f"time: {took.share:.3f} of the dense model's ({took.low:.3f} to {took.high:.3f}), batch "
                f"{took.batch_size}, {took.device}"
            )
        if self.miss is not None:
            lines.append(f"asked: {self.asked:g} of {self.of}, missed by {self.miss:+.4f}")
        if self.total_macs > self.dense_macs:
            lines.append("Choosing costs more than what is left out saves: remove more, or earlier.")
        return "\n".join(lines)

    def to_json(self) -> dict:
        return {"format_version": 1, **dataclasses.asdict(self), "keep": self.keep, "miss": self.miss}


class TokenHandle:
    """The reduction on a model: switch it by `set`, read it by `report()`, take it off by `remove()`.

    Attributes:
        model: the model that the hooks are on.
        counts: per layer that reduces, how many patches it hands on at the model's own image size.
    """

    def __init__(self, host: TokenHost, state: TokenState, attached: list, timing: Timing | None = None):
        self.model, self._host, self._state, self._attached = host.model, host, state, attached
        self._budgets = Budgets(host, timing)
        self._measured: Measured | None = None
        self.counts: Counts = {layer: kept[0] for layer, kept in enumerate(state.schedule) if kept is not None}

    @property
    def method(self) -> TokenMethod:
        """What decides, as given."""
        return self._state.method

    @property
    def costs(self) -> TokenCosts:
        """Multiply-accumulates by number of patches; counted once."""
        return self._budgets.costs

    def set(self, **changes) -> TokenHandle:
        """Switch to other settings of the same method, such as `keep=0.5`; no hook is touched.

        A compiled model compiles once for each setting that it meets and keeps what it compiled.

        Raises:
            GenpruneError: an unknown setting or a bad value; the old setting then stays. Or the hooks are off.
        """
        self._check_on()
        return self._use(self.method.changed(**changes))

    def _check_on(self) -> None:
        if found_on(self.model)[0] is not self._state:
            raise GenpruneError(
                f"the hooks of this handle are off its {type(self.model).__name__}: it was removed; expected one that "
                "is on. Call gp.prune_tokens(model, method) again."
            )

    def _use(self, method: TokenMethod) -> TokenHandle:
        method = method.settled(self._host.merges, self._host.before_mlp)
        self._host.check(method)
        return self._take(method, self._budgets.plan(method))

    def _take(self, method: TokenMethod, planned: Planned) -> TokenHandle:
        self._state.schedule = per_layer(planned.counts, self._host)
        self._state.method = method
        self.counts, self._measured = planned.counts, planned.measured
        return self

    def report(self) -> TokenReport:
        """Patches and multiply-accumulates of each layer, counted now."""
        method = self.method
        rows = self.costs.layers(self.counts, method.placement)
        total = counted(self._host, method, self.counts)[""]
        return TokenReport(
            tuple(patches for patches, _ in rows),
            tuple(macs for _, macs in rows),
            self.costs.dense,
            total,
            total - self.costs.macs(self.counts, method.placement),
            method.keep if isinstance(method.keep, float | int) else None,
            method.of,
            self._measured,
        )

    def measure(self) -> Measured:
        """The share of the dense model's time that the present setting takes, measured now, calls in turns."""
        return self._budgets.measure(self.counts, self.method)

    def preset(self) -> TokenPreset:
        """The present setting with explicit counts, to save as JSON and to use again: `prune_tokens(model, path)`."""
        report = self.report()
        figures = {"macs": report.total_macs, "keep": report.keep}
        if self._measured is not None:
            figures |= {"latency": self._measured.share, "latency_batch_size": self._measured.batch_size}
        counts = self.counts or {self._host.scored[0]: self._host.patches}
        method = self.method.changed(keep=dict(counts), of="macs", layers=None)
        depth = len(self._host.paths)
        return TokenPreset(method, self._host.patches, depth, type(self.model).__name__, figures, "budget")

    def remove(self) -> None:
        """Take every hook off; the model is as it was, to the bit. A second call does nothing."""
        for hook in self._attached:
            hook.remove()
        self._attached.clear()

    def __enter__(self) -> TokenHandle:
        return self

    def __exit__(self, *error) -> None:
        self.remove()


def prune_tokens(
    target, method: TokenMethod | TokenPreset | str | os.PathLike, *, timing: Timing | None = None
) -> TokenHandle:
    """Let a model drop (or merge) tokens while it runs, in place and without training.

    Args:
        target: a timm transformer, a diffusers denoiser, or a pipeline of one.
        method: `ZeroTPrune(keep=0.65)`, `ToMe(r=13)`, ...; a preset, the path of its JSON file, or the name of a
            published one (`token_presets()`).
        timing: how wall time is measured for `of="latency"`. Default: batch 1, on the model's device.

    Returns:
        A `TokenHandle`, also a context manager.

    Raises:
        UnsupportedModel: no host file knows the class, or this model has something that stands in the way.
        PlanMismatch: the preset is for another depth, or its file cannot be read.
        GenpruneError: tokens of this model are reduced already; a layer does not exist; a budget cannot be met;
            nothing would be saved, and `keep=1` was not asked for.
    """
    model = denoiser(target)
    if isinstance(model, nn.Module) and reduced(model):
        raise GenpruneError(
            f"tokens of this {type(model).__name__} are reduced already; expected a model without. Call the handle's "
            "set(...) for other settings (genprune.tokens.handle.handle_of(model) finds it), or remove() first."
        )
    if isinstance(method, str | os.PathLike):
        method = read(method)
    if not isinstance(method, TokenMethod | TokenPreset | DiffusionTokens):
        raise GenpruneError(
            f"got {method!r}; expected a token method such as genprune.ZeroTPrune(keep=0.65), a preset, or the path "
            "of one. Pass one of these."
        )
    host = host_of(model)
    if isinstance(method, TokenPreset):
        method = method.fitted(host)
    if getattr(host, "denoiser", False):
        from genprune.tokens.diffusion_handle import reduce_denoiser

        return reduce_denoiser(host, method, timing)
    if isinstance(method, DiffusionTokens):
        raise UnsupportedModel(
            f"{type(model).__name__} is no denoiser; expected one for DiffusionTokens. Pass its method alone: "
            "settings.method."
        )
    state = TokenState(method, len(host.paths))
    handle = TokenHandle(host, state, [], timing)
    handle._use(method)
    handle._attached += host.attach(state)
    if not handle._attached:
        raise UnsupportedModel(
            f"nothing of this {type(model).__name__} could be hooked; expected blocks. `docs/tokens.md` lists models."
        )
    handle._attached += told_compilers(host.model, state)
    return handle


def handle_of(model: nn.Module, *, timing: Timing | None = None) -> TokenHandle:
    """The handle of a model whose tokens are reduced already: a deep copy, or one that was unpickled.

    Raises:
        GenpruneError: no tokens are reduced on it.
    """
    state, attached = found_on(denoiser(model))
    if state is None:
        raise GenpruneError(
            f"no tokens are reduced on this {type(model).__name__}; expected a model that gp.prune_tokens was called "
            "on, or a copy of one. Call gp.prune_tokens(model, method)."
        )
    host = host_of(denoiser(model))
    if getattr(host, "denoiser", False):
        from genprune.tokens.diffusion_handle import handle_found

        return handle_found(host, state, attached, timing)
    return TokenHandle(host, state, attached, timing)
