"""What every method has: a budget, constraints, a seed, and the checks of its fields."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from genprune.allocation import ALLOCATIONS, Request
from genprune.allocation.request import QUANTITIES, check_budget, check_kinds
from genprune.costs import Costs, SiteCosts
from genprune.criteria import Criterion, checked_scores, criterion_named
from genprune.cutting import plan_base
from genprune.denoising.capture import check_not_settings
from genprune.errors import GenpruneError, NoMatchingSites, nearest
from genprune.families import denoiser
from genprune.scores import Scores
from genprune.sites import KINDS, Sites

FORMAT_VERSION = 1


@dataclass(frozen=True)
class ScoringContext:
    """What a method is run on; see `genprune.score` for the fields that a user gives.

    Args:
        target: a pipeline or a model.
        sites: those to score.
        costs: of the model as it is, with all of its sites.
        dense: of the dense model.
        options: keyword arguments of the pipeline's call.
    """

    target: Any = field(repr=False)
    sites: Sites = field(repr=False)
    costs: SiteCosts = field(repr=False)
    dense: Costs = field(repr=False)
    prompts: Sequence | None = None
    data: Any = field(default=None, repr=False)
    loss_fn: Callable[..., Tensor] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    output_dir: str | os.PathLike | None = None
    resume: bool = False
    checkpointing_steps: int = 25
    progress: bool = True


@dataclass(frozen=True)
class Method:
    """What every method has: a budget, protected parts and a seed. Use a subclass.

    Args:
        keep: share of the whole dense denoiser that stays, in (0, 1].
        of: what `keep` is a share of, one of the method's `quantities`.
        kinds: kinds of sites that may go; None: the method's default.
        protect: shell-style patterns of site names that stay whole.
        seed: of every random draw.
    """

    keep: float = 0.8
    of: str = "params"
    kinds: tuple[str, ...] | None = None
    protect: tuple[str, ...] = ()
    seed: int = 0

    name: ClassVar[str] = ""
    quantities: ClassVar[tuple[str, ...]] = QUANTITIES
    scored_kinds: ClassVar[tuple[str, ...]] = KINDS  # those that it has a rule for
    trains: ClassVar[bool] = False  # whether it writes checkpoints, and can resume

    def __post_init__(self) -> None:
        for name in ("kinds", "protect"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        check_budget(self.keep, self.of, self.quantities)
        if self.kinds is not None:
            check_kinds(self.kinds)
            self._check_scored()
        check_whole("seed", self.seed, 0)

    def _check_scored(self) -> None:
        """Raises `NoMatchingSites` for kinds that the method has no rule for."""
        if unscored := [kind for kind in self.kinds if kind not in self.scored_kinds]:
            raise NoMatchingSites(
                f"{type(self).__name__} has no score for sites of kind '{unscored[0]}'; expected some of "
                f"{', '.join(self.scored_kinds)}. Leave it out of kinds, or score it with gp.Taylor."
            )

    @classmethod
    def facts(cls) -> type[Criterion] | type[Method]:
        """What has `needs`, `additive` and `summary`: the criterion, or a method that goes without one."""
        return criterion_named(cls.name)

    def scored(self, context: ScoringContext):
        """What serves plans for every budget: has `plan(keep=, of=, **changes)`, and `made_by` with notes."""
        raise NotImplementedError

    def changed(self, **changes: Any) -> Method:
        """A copy with other values. Raises `GenpruneError` for an unknown name or a value out of range."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise GenpruneError(
                    f"{type(self).__name__} has no '{name}'{nearest(name, known)}; expected {', '.join(known)}."
                )
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; `method_from_json` reads it."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values = {name: _listed(value) for name, value in values.items()}
        return {"format_version": FORMAT_VERSION, "method": self.name, **values}


@dataclass(frozen=True)
class UnitMethod(Method):
    """A method that scores single units of sites; an allocation turns the scores into a plan. Use a subclass.

    Args:
        of: also `units`: each kind keeps that share of its units.
        kinds: None: every kind that narrows layers (heads, neurons, channels, modulation). `branch`, `block` and
            `wrapper` remove whole modules and have to be asked for.
        allocation: `global` (one ranking, score per cost) or `uniform` (the same share in every site).
        min_keep: share of its units that a site of several units keeps at least, in [0, 1]; always at least one.
        round_to: neurons stay in multiples of this, >= 1.
        max_width_classes: at most this many combinations of widths among blocks of one class; None: any number.
    """

    allocation: str = "global"
    min_keep: float = 0.05
    round_to: int = 1
    max_width_classes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allocation not in ALLOCATIONS:
            raise GenpruneError(
                f"allocation={self.allocation!r}{nearest(str(self.allocation), ALLOCATIONS)}; expected one of "
                f"{', '.join(ALLOCATIONS)}."
            )
        check_range("min_keep", self.min_keep, 0, 1)
        check_whole("round_to", self.round_to, 1)
        if self.max_width_classes is not None:
            check_whole("max_width_classes", self.max_width_classes, 1)

    def criterion(self):
        """The criterion that scores for this method."""
        return criterion_named(self.name)()

    def calibration(self, target, prompts, data, loss_fn, options: Mapping[str, Any], progress: bool):
        """What the criterion is calibrated on; None where it reads weights only.

        Args:
            options: keyword arguments of the pipeline's call.
        """
        return None

    def scored(self, context: ScoringContext) -> Scores:
        values, notes = self.values(context)
        return Scores(values, self, plan_base(denoiser(context.target)), context.costs, context.dense, notes)

    def values(self, context: ScoringContext) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Site name -> scores of shape `(size,)`, higher = keep; and what else is worth noting in a plan."""
        settings = [field.name for field in dataclasses.fields(self)]
        check_not_settings(context.options, settings, f"gp.{type(self).__name__}")
        criterion = self.criterion()
        calibration = self.calibration(
            context.target, context.prompts, context.data, context.loss_fn, context.options, context.progress
        )
        scores = criterion.scores(denoiser(context.target), context.sites, calibration)
        return checked_scores(scores, context.sites, self.name), {}

    def request(self, kinds: Sequence[str]) -> Request:
        """The method's budget and constraints over these kinds of sites, as an allocation takes them."""
        return Request(
            keep=self.keep,
            of=self.of,
            kinds=tuple(kinds),
            allocation=self.allocation,
            min_keep=self.min_keep,
            round_to=self.round_to,
            max_width_classes=self.max_width_classes,
            protect=self.protect,
        )


def _listed(value: Any) -> Any:
    """Tuples as lists, at every depth, as JSON reads them back."""
    return [_listed(item) for item in value] if isinstance(value, (tuple, list)) else value


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """Raises `GenpruneError` for a field that is no number in this range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise GenpruneError(f"{name}={value!r}; expected a number from {low} to {high}.")


def check_whole(name: str, value: Any, low: int) -> None:
    """Raises `GenpruneError` for a field that is no whole number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise GenpruneError(f"{name}={value!r}; expected a whole number of at least {low}.")


def with_progress(batches: Iterable, total: int | None) -> Iterator:
    """The batches, with a bar that counts them."""
    from tqdm.auto import tqdm

    yield from tqdm(batches, total=total, desc="scoring", unit="batch")
