"""`fitted`: operators for modules of a model, with values in closed form from recorded calls."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from genprune.denoising.activations import PACKAGE_BYTES, shown
from genprune.denoising.replay import ModelCall
from genprune.errors import BadCalibrationData, GenpruneError, nearest
from genprune.layers.moments import ChannelMoments, PairMoments
from genprune.operators import Operator, beside, operator_named
from genprune.recovery.least_squares import least_squares
from genprune.untouched import untouched

_MOMENTS = {"matrix": PairMoments, "channels": ChannelMoments}
logger = logging.getLogger(__name__)


@torch.no_grad()
def fitted(
    model: nn.Module,
    requests: Mapping[str, tuple[str, str, Mapping[str, Any]]],
    calls: Iterable[ModelCall],
    *,
    damping: float = 0.01,
    modules_per_pass: int | None = None,
    progress: bool = False,
) -> dict[str, Operator]:
    """An operator for each request, fitted to what its module does on the calls; the model stays as it is.

    Operators whose values follow from weights alone, or that have none, are not measured; where all are such, no call
    is played. Requests for one module that need the same moments (several ranks) share them.

    Args:
        model: on its device.
        requests: any key -> (module path, operator name, settings of the operator).
        calls: played once for every package of modules.
        damping: share of the mean diagonal of each Gram matrix that is added to it, >= 0.
        modules_per_pass: modules measured in one pass; None: as many as fit in 4 GB of moments.
        progress: show a progress bar.

    Returns:
        The operators by the keys of the requests, in their order; on their module's device and in its dtype, or in
        the model's where the module has no tensors.

    Raises:
        GenpruneError: a path, operator or setting is wrong, `damping` or `modules_per_pass` is out of range, or an
        activation is not finite. BadCalibrationData: a module to measure never ran. Nothing is played before all
        requests are checked.
    """
    _check_numbers(damping, modules_per_pass)
    found: dict[str, Operator] = {}
    measured: dict[tuple, _Measurement] = {}
    for key, (path, name, settings) in requests.items():
        removed, cls = _module(model, path), operator_named(name)
        operator = cls.build(removed, settings)
        if cls.takes_data(operator.settings):
            place = (path, cls, operator.measured())
            measured.setdefault(place, _Measurement(path, removed)).operators.append(operator)
        else:
            operator = cls.from_weights(removed, settings)
        found[key] = beside(operator, removed, model)
    solver = _Solver(damping)
    groups = _packages(list(measured.values()), modules_per_pass)
    calls = calls if len(groups) < 2 else list(calls)  # an iterator has one pass
    with untouched(model):
        for number, group in enumerate(groups, start=1):
            _measure(model, group, shown(calls, f"operators {number}/{len(groups)}", progress))
            for measurement in group:
                solver.solve(measurement)
    solver.report(len(measured))
    return found


def _check_numbers(damping: float, modules_per_pass: int | None) -> None:
    if not (isinstance(damping, (int, float)) and 0 <= damping < math.inf):
        raise GenpruneError(f"damping is {damping!r}; expected a finite number >= 0. Pass e.g. damping=0.01.")
    if modules_per_pass is not None and (not isinstance(modules_per_pass, int) or modules_per_pass < 1):
        raise GenpruneError(
            f"modules_per_pass is {modules_per_pass!r}; expected a whole number >= 1, or None. Pass such a number."
        )


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        known = [name for name, _ in model.named_modules()]
        raise GenpruneError(
            f"{type(model).__name__} has no module '{path}'{nearest(path, known)}; expected the path of a module. "
            "List them with model.named_modules()."
        ) from None


@dataclass
class _Measurement:
    """The moments of one module, for operators that need the same; its hook adds one call to them."""

    path: str
    removed: nn.Module
    operators: list[Operator] = field(default_factory=list)
    moments: dict[str, PairMoments | ChannelMoments] = field(default_factory=dict)
    weight: float = 1.0

    @property
    def first(self) -> Operator:
        return self.operators[0]

    def size(self) -> int:
        """Bytes of its moments."""
        return sum(_MOMENTS[self.first.moments].size(*widths) for widths in self.first.maps().values())

    def hook(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        widths = self.first.maps()
        for name, inputs, outputs in self.first.rows(self.first.given(args, kwargs), output):
            inputs, outputs = _wide(inputs), _wide(outputs)
            if (inputs.shape[1], outputs.shape[1]) != widths[name]:
                raise GenpruneError(
                    f"'{self.path}' maps '{name}' from {inputs.shape[1]} to {outputs.shape[1]} features; expected "
                    f"{widths[name][0]} to {widths[name][1]}, as the settings of '{self.first.name}' say. "
                    "Correct the settings."
                )
            if name not in self.moments:
                self.moments[name] = _MOMENTS[self.first.moments].zeros(*widths[name], inputs.device)
            self.moments[name].add(inputs, outputs, self.weight)


def _wide(rows: Tensor) -> Tensor:
    return rows.float() if rows.dtype.itemsize < 4 else rows


def _packages(measurements: list[_Measurement], modules_per_pass: int | None) -> list[list[_Measurement]]:
    groups: list[list[_Measurement]] = []
    held = 0
    for measurement in measurements:
        size = measurement.size()
        full = bool(groups) and (
            held + size > PACKAGE_BYTES if modules_per_pass is None else len(groups[-1]) == modules_per_pass
        )
        if not groups or full:
            groups.append([])
            held = 0
        groups[-1].append(measurement)
        held += size
    return groups


def _measure(model: nn.Module, group: list[_Measurement], calls: Iterable[ModelCall]) -> None:
    hooks = [m.removed.register_forward_hook(m.hook, with_kwargs=True) for m in group]
    try:
        for call in calls:
            for measurement in group:
                measurement.weight = call.weight
            call.play(model)
    finally:
        for hook in hooks:
            hook.remove()


class _Solver:
    """Gives operators their values, and remembers whose were decided by the damping."""

    def __init__(self, damping: float):
        self.damping = damping
        self.short: dict[str, tuple[int, int]] = {}  # path -> (features, positions)

    def solve(self, measurement: _Measurement) -> None:
        path, operator = measurement.path, measurement.first
        for name, (features, _) in operator.maps().items():
            moments = measurement.moments.get(name)
            if moments is None or not moments.positions:
                raise BadCalibrationData(
                    f"'{path}' never ran with '{name}' on the calibration data, so that no '{operator.name}' can be "
                    "fitted; expected every module to. Calibrate on inputs like those that the model will be used "
                    "with, or leave this module out."
                )
            if not moments.is_finite():
                raise GenpruneError(
                    f"what '{path}' is given or returns is not finite; expected finite activations. Check the "
                    "model's weights, and calibrate in float32 or bfloat16 rather than float16."
                )
            if operator.moments == "matrix" and moments.positions < features:
                self.short[path] = features, moments.positions
        for operator in measurement.operators:
            operator.fit(measurement.removed, measurement.moments, self.ridge)
        measurement.moments = {}

    def ridge(self, moments: PairMoments, with_bias: bool) -> tuple[Tensor, Tensor]:
        update = least_squares(moments.residual(), self.damping, with_bias)
        return update.weight, update.bias

    def report(self, total: int) -> None:
        if not self.short:
            return
        path, (features, positions) = next(iter(self.short.items()))
        logger.warning(
            "%d of %d modules were fitted on fewer positions than features ('%s': %d on %d), so that the damping "
            "decides the rest; pass more prompts or data",
            *(len(self.short), total, path, positions, features),
        )
