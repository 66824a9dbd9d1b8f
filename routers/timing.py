"""Measured time in place of MACs: what each module of a model takes, so that a budget can be of latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from genprune.costs import Costs, ModuleCosts, SiteCosts, site_costs
from genprune.families import family_of
from genprune.metrics.device import synchronize

WARM_UP, ROUNDS = 2, 7


class _Timer:
    """Adds up how long one module runs in a forward call, with all that is in it."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.device, self.spent = device, 0.0
        self._handles = [module.register_forward_pre_hook(self.before), module.register_forward_hook(self.after)]

    def before(self, module: nn.Module, inputs: tuple) -> None:
        synchronize(self.device)
        self.start = time.perf_counter()

    def after(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        synchronize(self.device)
        self.spent += time.perf_counter() - self.start

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@torch.inference_mode()
def module_times(model: nn.Module, costs: SiteCosts, rounds: int = ROUNDS) -> dict[str, int]:
    """Module path -> nanoseconds of one forward call that it takes itself, sub-modules not included; medians.

    Modules wait for the device one by one, so that overlap on a GPU does not show: what a cut saves as a whole is
    measured again when plans are made.

    Args:
        model: on the device to time, in evaluation mode.
        costs: of its sites; their operating point is the input.
        rounds: timed calls, after two others.
    """
    parameter = next(model.parameters())
    point = costs.total.operating_point
    inputs = family_of(model).example_inputs(model, point, parameter.device, parameter.dtype)
    spent: dict[str, list[float]] = {path: [] for path, _ in model.named_modules()}
    for index in range(WARM_UP + rounds):
        timers = {path: _Timer(module, parameter.device) for path, module in model.named_modules()}
        try:
            model(**inputs)
        finally:
            for timer in timers.values():
                timer.remove()
        if index >= WARM_UP:
            for path, timer in timers.items():
                spent[path].append(timer.spent)
    inside = {path: statistics.median(values) for path, values in spent.items()}
    return {path: round(1e9 * _own(path, module, inside)) for path, module in model.named_modules()}


def _own(path: str, module: nn.Module, inside: Mapping[str, float]) -> float:
    """Seconds less those of what it calls; a container is never called itself."""
    below = sum(_called(f"{path}.{name}" if path else name, child, inside) for name, child in module.named_children())
    return max(0.0, inside[path] - below) if inside[path] else 0.0


def _called(path: str, module: nn.Module, inside: Mapping[str, float]) -> float:
    """Seconds of a module, or of what is in a container."""
    if inside[path]:
        return inside[path]
    return sum(_called(f"{path}.{name}", child, inside) for name, child in module.named_children())


def timed_costs(model: nn.Module, costs: SiteCosts, times: Mapping[str, int]) -> SiteCosts:
    """The costs of a model's sites with nanoseconds where MACs stand: a layer's time is shared out over its units.

    Args:
        times: what `module_times` gave.
    """
    modules = {path: ModuleCosts(each.params, times.get(path, 0)) for path, each in costs.total.modules.items()}
    whole = sum(each.macs for each in modules.values())
    total = Costs(costs.total.params, whole, costs.total.operating_point, modules)
    return site_costs(model, costs.total.operating_point, costs.sites, total)
