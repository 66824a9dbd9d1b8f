"""Reduce a denoiser's image tokens by hooks, along a chain of steps, and take them off again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace

from genprune.errors import BudgetUnreachable, GenpruneError, NoMatchingSites, UnsupportedModel
from genprune.tokens.attached import steps_of, told_compilers
from genprune.tokens.diffusion import DiffusionTokens
from genprune.tokens.handle import TokenHandle
from genprune.tokens.level_costs import Counts, LevelCosts, level_schedule
from genprune.tokens.methods import TokenMethod, ToMe
from genprune.tokens.schedule import default_layers
from genprune.tokens.state import TokenState


class DiffusionHandle(TokenHandle):
    """The reduction on a denoiser: switch it by `set`, read it by `report()`, take it off by `remove()`.

    Attributes:
        settings: how the method is used along the chain, see `DiffusionTokens`.
    """

    @property
    def settings(self) -> DiffusionTokens:
        return self._host.settings

    def set(self, **changes) -> DiffusionHandle:
        """Switch to other settings, of the method (`keep=0.5`) or of its use (`every=3`); no hook is touched.

        What earlier steps left is forgotten. Counts are made anew for the method that was given.

        Raises:
            GenpruneError: an unknown setting or a bad value; the old settings then stay.
        """
        return self.use(self.settings.changed(**changes))

    def use(self, settings: DiffusionTokens) -> DiffusionHandle:
        """Switch to these settings. Raises what `set` does."""
        self._check_on()
        return self._switch(settings)

    def _switch(self, settings: DiffusionTokens) -> DiffusionHandle:
        old = self._host.settings
        self._host.settings = settings
        if settings.operating_point != old.operating_point:
            self._costs_anew()
        try:
            self._use(self._effective(settings))
        except BaseException:
            self._host.settings = old
            self._costs_anew()
            raise
        if self._host.steps is not None:
            self._host.steps.settings = settings
            self._host.steps.reset()
        return self

    def _effective(self, settings: DiffusionTokens) -> TokenMethod:
        """The method as the hooks call it: what has no effect in a denoiser is switched off."""
        restore = {"update": "nearest"}.get(settings.restore, settings.restore)
        method = settings.method.changed(placement="after_block", proportional=False, restore=restore)
        if settings.tokens is not None:
            count = max(1, int(self._host.patches * settings.tokens))
            layers = default_layers(self._host, method)
            method = replace(method.changed(keep={layer: count for layer in layers}), of="macs")
        return method

    def _costs_anew(self) -> None:
        self._budgets = type(self._budgets)(self._host, self._budgets.timing)


@dataclass(frozen=True)
class LevelReport:
    """What a reduction leaves of a U-Net, at the operating point and batch 1.

    Attributes:
        tokens: per level, the image tokens of the full grid.
        kept: per level, the tokens that reduced blocks run on.
        blocks: per level, transformer blocks with self-attention; the first scores, and runs in full when it does.
        dense_macs: of the whole model in full.
        total_macs: in a step that scores, scoring included.
        reusing_macs: in a step that takes the choices of an earlier one.
        every: steps between two scorings.
    """

    tokens: tuple[int, ...]
    kept: tuple[int, ...]
    blocks: tuple[int, ...]
    dense_macs: int
    total_macs: int
    reusing_macs: int
    every: int

    @property
    def keep(self) -> float:
        """Share of the dense multiply-accumulates in a step that scores."""
        return self.total_macs / self.dense_macs

    @property
    def average_keep(self) -> float:
        """The same over a chain, early steps counted as all others."""
        return (self.total_macs + (self.every - 1) * self.reusing_macs) / self.every / self.dense_macs

    def __str__(self) -> str:
        lines = ["level  tokens   kept  blocks"]
        rows = zip(self.tokens, self.kept, self.blocks)
        lines += [f"{i:>5}  {n:>6}  {k:>5}  {b:>6}" for i, (n, k, b) in enumerate(rows)]
        lines.append(f"model: {self.total_macs:,} of {self.dense_macs:,} MACs, {self.keep:.4f}, scoring included")
        if self.every > 1:
            lines.append(f"average of {self.every} steps: {self.average_keep:.4f}")
        return "\n".join(lines)

    def to_json(self) -> dict:
        found = {**dataclasses.asdict(self), "keep": self.keep, "average_keep": self.average_keep}
        return {"format_version": 1, **found}


class LevelHandle(DiffusionHandle):
    """The reduction on a U-Net. `counts`: per level, the image tokens that its reduced blocks run on."""

    @property
    def costs(self) -> LevelCosts:
        """Multiply-accumulates by number of tokens; counted once for each setting of `around`."""
        key = self.settings.around
        if key not in self._level_costs:
            self._level_costs[key] = LevelCosts(self._host)
        return self._level_costs[key]

    def __init__(self, host, state: TokenState, attached: list, timing=None):
        super().__init__(host, state, attached, timing)
        self._level_costs: dict[str, LevelCosts] = {}

    def _costs_anew(self) -> None:
        self._level_costs = {}

    def _effective(self, settings: DiffusionTokens) -> TokenMethod:
        method = super()._effective(replace(settings, tokens=None))
        if settings.tokens is None:
            return method
        levels = self._levels(method)
        return method.changed(keep={n: max(1, int(self._host.tokens[n] * settings.tokens)) for n in levels})

    def _use(self, method: TokenMethod) -> LevelHandle:
        if method.of != "macs":
            raise GenpruneError(
                f"of='{method.of}' in a U-Net; expected 'macs'. Measure the time with gp.metrics.compare_latency, "
                "and set keep accordingly."
            )
        method = method.settled(self._host.merges, self._host.before_mlp)
        counts = self._planned(method)
        self._state.schedule = level_schedule(self._host, counts)
        self._state.method, self.counts = method, counts
        return self

    def _levels(self, method: TokenMethod) -> tuple[int, ...]:
        """Levels where tokens are reduced, checked."""
        levels = self._host.scored if method.layers is None else tuple(sorted(method.layers))
        for level in levels:
            self._check(level)
        return levels

    def _check(self, level: int) -> None:
        if level not in self._host.scored:
            raise NoMatchingSites(
                f"there is no level {level!r} of this {type(self.model).__name__} with two transformer blocks or "
                f"more; expected one of {list(self._host.scored)} (0 is the finest resolution). Pass one of these."
            )

    def _planned(self, method: TokenMethod) -> Counts:
        full = self._host.tokens
        if isinstance(method.keep, Mapping):
            counts = {}
            for level, value in method.keep.items():
                self._check(level)
                counts[level] = max(1, int(full[level] * value)) if isinstance(value, float) else value
                if counts[level] > full[level]:
                    raise GenpruneError(
                        f"level {level} is to keep {counts[level]} of {full[level]} tokens; expected 1 to "
                        f"{full[level]}. Pass fewer, or a share such as 0.5."
                    )
            self._check_halves(method, counts)
            return counts
        levels = self._levels(method)
        if method.keep is None:
            return {level: full[level] - min(method.r, full[level] // 2) for level in levels}
        if method.keep >= 1:
            return {level: full[level] for level in levels}
        return self._solved(method, levels)

    def _check_halves(self, method: TokenMethod, counts: Counts) -> None:
        for level, count in counts.items():
            if isinstance(method, ToMe) and 2 * count < self._host.tokens[level]:
                raise GenpruneError(
                    f"level {level} is to keep {count} of {self._host.tokens[level]} tokens; {type(method).__name__} "
                    "pairs tokens, so that at least half stay. Raise keep, or use gp.ZeroTPrune."
                )

    def _solved(self, method: TokenMethod, levels: tuple[int, ...]) -> Counts:
        """One share of tokens for all levels, the largest that meets the budget with scoring included."""
        full, costs = self._host.tokens, self.costs

        def counts_at(share: float) -> Counts:
            return {level: max(1, int(full[level] * share)) for level in levels}

        low = 0.5 if isinstance(method, ToMe) else 0.0
        least = costs.total(counts_at(low), method)
        if least > method.keep * costs.dense:
            raise BudgetUnreachable(
                f"keep={method.keep} of the MACs of this {type(self.model).__name__} is below what its transformer "
                f"blocks can give: the fewest tokens at levels {list(levels)} still cost {least / costs.dense:.3f}. "
                "Raise keep; or say how many tokens stay, gp.DiffusionTokens(method, tokens=0.5)."
            )
        upper = 1.0
        for _ in range(20):
            middle = (low + upper) / 2
            fits = costs.total(counts_at(middle), method) <= method.keep * costs.dense
            low, upper = (middle, upper) if fits else (low, middle)
        counts = counts_at(low)
        if counts == {level: full[level] for level in levels}:
            raise BudgetUnreachable(
                f"keep={method.keep} leaves every token: scoring takes what fewer tokens would save. Lower keep."
            )
        return counts

    def report(self) -> LevelReport:
        """Tokens of each level, and multiply-accumulates of the model."""
        host, counts = self._host, self.counts
        return LevelReport(
            tokens=host.tokens,
            kept=tuple(counts.get(level, full) for level, full in enumerate(host.tokens)),
            blocks=tuple(map(len, host.blocks)),
            dense_macs=self.costs.dense,
            total_macs=self.costs.total(counts, self.method),
            reusing_macs=self.costs.reusing(counts),
            every=self.settings.every,
        )


def handle_found(host, state: TokenState, attached: list, timing=None) -> DiffusionHandle:
    """The handle of a denoiser whose hooks are on. See `genprune.tokens.handle.handle_of`."""
    host.steps = steps_of(attached)
    host.settings = host.steps.settings
    return (LevelHandle if hasattr(host, "blocks") else DiffusionHandle)(host, state, attached, timing)


def reduce_denoiser(host, settings: DiffusionTokens | TokenMethod, timing=None) -> DiffusionHandle:
    """Attach to a denoiser's host. See `genprune.tokens.handle.prune_tokens`."""
    settings = settings if isinstance(settings, DiffusionTokens) else DiffusionTokens(settings)
    state = TokenState(settings.method, len(host.paths))
    handle = (LevelHandle if hasattr(host, "blocks") else DiffusionHandle)(host, state, [], timing)
    handle._switch(settings)
    handle._attached += host.attach(state)
    if not handle._attached:
        raise UnsupportedModel(f"nothing of this {type(host.model).__name__} could be hooked; expected blocks.")
    handle._attached += told_compilers(host.model, state)
    return handle
