"""What each layer takes in time: module by module in the running model, operators beside what they replace."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from genprune.families import OperatingPoint, family_of
from genprune.layers.candidates import Candidate, stand_ins
from genprune.metrics.device import device_name, synchronize
from genprune.sites import Sites

ROUNDS, WARM_UP = 7, 2


class _Timer:
    """Adds up how long one module runs in a forward call."""

    def __init__(self, module: nn.Module, device: torch.device):
        self.device, self.spent, self.inputs = device, 0.0, None
        self._handles = [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after),
        ]

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.inputs = args, kwargs
        synchronize(self.device)
        self.start = time.perf_counter()

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        synchronize(self.device)
        self.spent += time.perf_counter() - self.start

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@torch.inference_mode()
def with_latencies(
    model: nn.Module, sites: Sites, candidates: Sequence[Candidate], point: OperatingPoint, rounds: int = ROUNDS
) -> tuple[list[Candidate], float, str]:
    """The candidates with `saves["latency"]` in milliseconds, the model's own milliseconds, and the device in words.

    A removal saves the time of the modules that leave, an operator what its module takes less what it takes itself on
    the same inputs, and units that go their share of their module. Medians over rounds. Neighbouring work overlaps on
    a GPU, so that a plan's saving is measured again as a whole by `make_plan`.

    Args:
        model: in evaluation mode, on the device to time.
        point: the input's shape.
        rounds: timed calls.
    """
    parameter = next(model.parameters())
    inputs = family_of(model).example_inputs(model, point, parameter.device, parameter.dtype)
    modules = {candidate.name: stand_ins(model, sites, candidate) for candidate in candidates}
    narrowed = {c.name: [(sites[n].path, m) for n, m in c.keep.items() if m.any()] for c in candidates}
    paths = [*(path for found in modules.values() for path in found), *(p for n in narrowed.values() for p, _ in n)]
    paths = list(dict.fromkeys(paths))
    whole: list[float] = []
    shares: dict[str, list[float]] = {path: [] for path in paths}  # of the call that they were timed in
    given: dict[str, Any] = {}
    for index in range(WARM_UP + rounds):
        plain = _seconds(lambda: model(**inputs), parameter.device)
        timers = {path: _Timer(model.get_submodule(path), parameter.device) for path in paths}
        try:
            watched = _seconds(lambda: model(**inputs), parameter.device)
        finally:
            for timer in timers.values():
                timer.remove()
        for path, timer in timers.items():
            given[path] = timer.inputs
            if index >= WARM_UP:
                shares[path].append(timer.spent / watched)
        if index >= WARM_UP:
            whole.append(plain)
    # a share of its own call stays right on a machine whose speed changes from call to call
    takes = {path: statistics.median(values) * statistics.median(whole) for path, values in shares.items()}
    timed = []
    for candidate in candidates:
        saved = sum(
            takes[path] - _own_time(stand_in, given[path], parameter.device, rounds)
            for path, stand_in in modules[candidate.name].items()
        )
        saved += sum(takes[path] * (1 - float(mask.float().mean())) for path, mask in narrowed[candidate.name])
        timed.append(dataclasses.replace(candidate, saves={**candidate.saves, "latency": max(saved, 0.0) * 1000}))
    return timed, statistics.median(whole) * 1000, device_name(parameter.device)


def _own_time(stand_in: nn.Module, given: tuple[tuple, dict] | None, device: torch.device, rounds: int) -> float:
    """Median seconds of what stands there instead; nothing where the module never ran."""
    if given is None or not any(True for _ in stand_in.parameters()):
        return 0.0
    args, kwargs = given
    times = [_seconds(lambda: stand_in(*args, **kwargs), device) for _ in range(WARM_UP + rounds)]
    return statistics.median(times[WARM_UP:])


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start
