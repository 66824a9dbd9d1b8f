"""From a method to counts: written out, by a number per layer, or the ones that meet a budget of MACs or of time."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from genprune.errors import BudgetUnreachable
from genprune.tokens.costs import TokenCosts, counted, scoring_settings
from genprune.tokens.hosts import TokenHost
from genprune.tokens.latency import TimeModel, Timing
from genprune.tokens.methods import TokenMethod, ToMe
from genprune.tokens.schedule import Counts, check_acts, explicit, per_layer, solve

_TRIES, _NEAR = 4, 0.01  # measurements of a time budget, and the miss that needs no further one
_EXACT = 2e-4  # of the dense multiply-accumulates: planned and counted may differ by that much
_POINTS = (0.85, 0.7, 0.55, 0.4)  # shares of the MACs at which time is measured to plan with


@dataclass(frozen=True)
class Measured:
    """A measured share of the dense model's time.

    Attributes:
        share: median over rounds of the ratio, with the ends of its 95 % interval.
        batch_size: images a call.
        device: what it ran on, in words.
    """

    share: float
    low: float
    high: float
    batch_size: int
    device: str


@dataclass(frozen=True)
class Planned:
    """Counts, and for a budget of time what they were measured to take."""

    counts: Counts
    measured: Measured | None = None


class Budgets:
    """Costs of one model, counted and measured once, and counts for methods.

    Args:
        host: the model.
        timing: how wall time is measured, for `of="latency"`.
    """

    def __init__(self, host: TokenHost, timing: Timing | None = None):
        self.host = host
        self.timing = timing or Timing()
        self._costs: TokenCosts | None = None
        self._offsets: dict[str, float] = {}
        self._time_models: dict[str, TimeModel] = {}

    @property
    def costs(self) -> TokenCosts:
        """Multiply-accumulates by number of patches; counted once."""
        if self._costs is None:
            self._costs = TokenCosts(self.host)
        return self._costs

    def plan(self, method: TokenMethod) -> Planned:
        """Counts for a method.

        Raises:
            BudgetUnreachable: the message has the least that can be reached.
            GenpruneError: a layer does not exist, counts rise, or nothing would be saved.
        """
        measured = None
        if isinstance(method.keep, Mapping):
            counts = explicit(method.keep, self.host)
        elif method.keep is None:
            counts = self._by_number(method)
        elif method.of == "latency" and method.keep < 1:
            counts, measured = self._for_time(method)
        else:
            counts = self._for_macs(method)
        check_acts(method, counts, self.host)
        return Planned(counts, measured)

    def share(self, counts: Counts, method: TokenMethod) -> float:
        """Share of the dense multiply-accumulates, scoring included."""
        offset = self._offsets.get(scoring_settings(method), 0.0)
        return self.costs.total(counts, method) / self.costs.dense + offset

    def rough_share(self, counts: Counts, method: TokenMethod) -> float:
        """`share` in microseconds, within some 0.1 %."""
        offset = self._offsets.get(scoring_settings(method), 0.0)
        return self.costs.rough(counts, method) / self.costs.dense + offset

    def _by_number(self, method: TokenMethod) -> Counts:
        counts = dict(enumerate(method.counts(self.host.patches, len(self.host.paths))))
        if isinstance(method, ToMe) and method.r > self.host.patches // 2:
            warnings.warn(
                f"r={method.r} is above half of the {self.host.patches} patches; at most half can go in a layer, so "
                f"that layers hand on {', '.join(map(str, counts.values()))}. Lower r.",
                stacklevel=5,
            )
        return counts

    def _for_macs(self, method: TokenMethod) -> Counts:
        """Counts by what layers cost one by one, corrected by what the whole then costs."""
        settings, near = scoring_settings(method), 0.0
        for _ in range(_TRIES):

            def predicted(counts: Counts, correction: float = near) -> float:
                return self.rough_share(counts, method) + correction

            counts = solve(method.keep, predicted, self.host, method)
            if method.keep >= 1:
                break
            if settings not in self._offsets:  # a host whose blocks do more than the layers' costs say
                whole = counted(self.host, method, counts)[""] / self.costs.dense
                self._offsets[settings] = whole - self.costs.total(counts, method) / self.costs.dense
            miss = self.share(counts, method) - predicted(counts)
            if abs(miss) < _EXACT:
                break
            near += miss
        return counts

    def _for_time(self, method: TokenMethod) -> tuple[Counts, Measured]:
        """Counts by the line through some measurements, measured and corrected until they are near."""
        best, offset = None, 0.0
        model = self.time_model(method)

        def predicted(counts: Counts) -> float:
            return model.share(self.rough_share(counts, method), acting(counts, self.host)) + offset

        for _ in range(_TRIES):
            try:
                counts = solve(method.keep, predicted, self.host, method, "the measured time")
            except BudgetUnreachable:
                if best is None:
                    raise
                break
            measured = self.measure(counts, method)
            if best is None or abs(measured.share - method.keep) < abs(best[1].share - method.keep):
                best = counts, measured
            if abs(measured.share - method.keep) <= _NEAR:
                break
            offset += measured.share - predicted(counts)
        return best

    def time_model(self, method: TokenMethod, schedules: Mapping[str, Counts] | None = None) -> TimeModel:
        """The line that time of this method follows; measured once for each of its settings.

        Args:
            method: of which the score, the stages and the placement matter.
            schedules: counts to measure at, by any name. Default: four budgets of MACs at the layers of the method.
        """
        settings = scoring_settings(method) + str(method.layers)
        if settings not in self._time_models:
            schedules = schedules or self._usual(method)
            timed = self.timing.measure(self.host, {name: (method, one) for name, one in schedules.items()})
            points = [
                (self.share(one, method), acting(one, self.host), timed.ratio[name].estimate)
                for name, one in schedules.items()
            ]
            self._time_models[settings] = TimeModel.through(points)
        return self._time_models[settings]

    def _usual(self, method: TokenMethod) -> dict[str, Counts]:
        schedules = {}
        for share in _POINTS:
            try:
                schedules[f"{share}"] = self._for_macs(method.changed(keep=share, of="macs"))
            except BudgetUnreachable:
                break
        if not schedules:
            raise BudgetUnreachable(
                f"tokens reduced after layers {method.layers} save less than {1 - _POINTS[0]:.0%} of the "
                "multiply-accumulates, too little to plan time with. Give earlier layers=(...), or keep={...}."
            )
        return schedules

    def measure(self, counts: Counts, method: TokenMethod) -> Measured:
        """The share of the dense time that these counts take, measured now."""
        timed = self.timing.measure(self.host, {"reduced": (method, counts)})
        ratio = timed.ratio["reduced"]
        return Measured(ratio.estimate, ratio.low, ratio.high, self.timing.batch_size, timed.device)


def acting(counts: Counts, host: TokenHost) -> int:
    """How many layers remove something."""
    return sum(kept is not None for kept in per_layer(counts, host))
