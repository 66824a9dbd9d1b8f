"""The named methods: frozen dataclasses that say how to score, and what a plan has to meet."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from genprune.allocation import ALLOCATIONS
from genprune.allocation.request import check_budget, check_kinds
from genprune.criteria import criterion_named
from genprune.denoising import calibration_batches
from genprune.errors import GenpruneError, nearest
from genprune.families import denoiser_slot

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Method:
    """What every method has: a budget, constraints and a seed. Use a subclass.

    Args:
        keep: share of the whole dense denoiser that stays, in (0, 1].
        of: what `keep` is a share of: `params`, `macs`, or `units` (each kind keeps that share of its units).
        kinds: kinds of sites that may lose units; None: every kind that narrows layers (heads, neurons, channels,
            modulation). `branch`, `block` and `wrapper` remove whole modules and have to be asked for.
        allocation: `global` (one ranking, score per cost) or `uniform` (the same share in every site).
        min_keep: share of its units that a site of several units keeps at least, in [0, 1]; always at least one.
        round_to: neurons stay in multiples of this, >= 1.
        max_width_classes: at most this many combinations of widths among blocks of one class; None: any number.
        protect: shell-style patterns of site names that stay whole.
        seed: of every random draw.
    """

    keep: float = 0.8
    of: str = "params"
    kinds: tuple[str, ...] | None = None
    allocation: str = "global"
    min_keep: float = 0.05
    round_to: int = 1
    max_width_classes: int | None = None
    protect: tuple[str, ...] = ()
    seed: int = 0

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for field in ("kinds", "protect"):
            value = getattr(self, field)
            if value is not None:
                object.__setattr__(self, field, (value,) if isinstance(value, str) else tuple(value))
        check_budget(self.keep, self.of)
        if self.kinds is not None:
            check_kinds(self.kinds)
        if self.allocation not in ALLOCATIONS:
            raise GenpruneError(
                f"allocation={self.allocation!r}{nearest(str(self.allocation), ALLOCATIONS)}; expected one of "
                f"{', '.join(ALLOCATIONS)}."
            )
        _check_range("min_keep", self.min_keep, 0, 1)
        _check_whole("round_to", self.round_to, 1)
        _check_whole("seed", self.seed, 0)
        if self.max_width_classes is not None:
            _check_whole("max_width_classes", self.max_width_classes, 1)

    def criterion(self):
        """The criterion that scores for this method."""
        return criterion_named(self.name)()

    def calibration(self, target, prompts, data, loss_fn, size: Mapping[str, int], progress: bool):
        """What the criterion is calibrated on; None where it reads weights only."""
        return None

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
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {"format_version": FORMAT_VERSION, "method": self.name, **values}


@dataclass(frozen=True)
class Random(Method):
    """Random units under the budget; the baseline that every method has to beat."""

    name: ClassVar[str] = "random"

    def criterion(self):
        return criterion_named(self.name)(seed=self.seed)


@dataclass(frozen=True)
class Magnitude(Method):
    """Units of small weights go, each layer relative to itself; needs no data."""

    name: ClassVar[str] = "magnitude"


@dataclass(frozen=True)
class Taylor(Method):
    """Units whose removal changes the loss least, to first order; needs prompts (a pipeline) or data (a model).

    Args:
        timesteps: how many, spread evenly over the training range, or which ones.
        samples: images that a pipeline draws to calibrate on; None: one per prompt, 16 without prompts.
        steps: denoising steps of the runs that draw them, >= 1.
        guidance_scale: of those runs; None: the pipeline's default.
        batch_size: rows a backward pass, >= 1.
        weights: one weight per timestep, in ascending order of timesteps; None: uniform.
        threshold: leave out timesteps whose mean loss is under this share of the largest, in [0, 1).

    Reference:
        Diff-Pruning (Fang et al., arXiv 2305.10924) for the threshold; 0.05 in pixel space, 0.1 in latent space.
    """

    timesteps: int | tuple[int, ...] = 8
    samples: int | None = None
    steps: int = 20
    guidance_scale: float | None = None
    batch_size: int = 4
    weights: tuple[float, ...] | None = None
    threshold: float = 0.0

    name: ClassVar[str] = "taylor"

    def __post_init__(self) -> None:
        for field in ("timesteps", "weights"):
            if isinstance(getattr(self, field), (list, tuple)):
                object.__setattr__(self, field, tuple(getattr(self, field)))
        super().__post_init__()
        if isinstance(self.timesteps, tuple):
            if not self.timesteps or len(set(self.timesteps)) != len(self.timesteps):
                raise GenpruneError(f"timesteps={self.timesteps}; expected different whole numbers, at least one.")
            for timestep in self.timesteps:
                _check_whole("timesteps", timestep, 0)
        else:
            _check_whole("timesteps", self.timesteps, 1)
        _check_whole("steps", self.steps, 1)
        _check_whole("batch_size", self.batch_size, 1)
        if self.samples is not None:
            _check_whole("samples", self.samples, 1)
        if self.guidance_scale is not None:
            _check_range("guidance_scale", self.guidance_scale, 0, 1000)
        for weight in self.weights or ():
            _check_range("weights", weight, 0, float("inf"))
        _check_range("threshold", self.threshold, 0, 0.999)

    def criterion(self):
        return criterion_named(self.name)(weights=self.weights, threshold=self.threshold)

    def calibration(self, target, prompts, data, loss_fn, size: Mapping[str, int], progress: bool):
        batches = calibration_batches(
            target,
            prompts,
            data,
            loss_fn=loss_fn,
            timesteps=self.timesteps,
            samples=self.samples,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            batch_size=self.batch_size,
            seed=self.seed,
            **size,
        )
        return _with_progress(batches, self._batches(target, prompts, data)) if progress else batches

    def _batches(self, target, prompts, data) -> int | None:
        """How many batches there will be, where that is known before."""
        if denoiser_slot(target) is None or data is not None:
            return len(data) if hasattr(data, "__len__") and denoiser_slot(target) is None else None
        samples = self.samples or (len(prompts) if prompts else 16)
        times = self.timesteps if isinstance(self.timesteps, int) else len(self.timesteps)
        return -(-samples // self.batch_size) * times


def _with_progress(batches: Iterable, total: int | None) -> Iterator:
    from tqdm.auto import tqdm

    yield from tqdm(batches, total=total, desc="scoring", unit="batch")


_METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (Random, Magnitude, Taylor)}


@dataclass(frozen=True)
class MethodCard:
    """One line of `genprune methods`."""

    name: str
    needs: tuple[str, ...]
    summary: str


def methods() -> tuple[MethodCard, ...]:
    """The methods by name: what each needs, and one line about it."""
    cards = []
    for name in _METHODS:
        criterion = criterion_named(name)
        cards.append(MethodCard(name, criterion.needs, criterion.summary))
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


def _check_range(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise GenpruneError(f"{name}={value!r}; expected a number from {low} to {high}.")


def _check_whole(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise GenpruneError(f"{name}={value!r}; expected a whole number of at least {low}.")
