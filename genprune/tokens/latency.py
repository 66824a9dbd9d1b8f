"""What fewer tokens save in wall time: measured beside the dense model, and a line through it to plan with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from genprune.metrics.latency import LatencyComparison, compare_latency
from genprune.tokens import checks
from genprune.tokens.attached import take_off
from genprune.tokens.hosts import TokenHost, twin_of
from genprune.tokens.methods import TokenMethod
from genprune.tokens.schedule import Counts, per_layer
from genprune.tokens.state import TokenState
from genprune.untouched import untouched

Compare = Callable[..., LatencyComparison]


@dataclass(frozen=True)
class Timing:
    """How wall time is measured: calls of the dense and of the reduced model in turns, on the model's device.

    Args:
        batch_size: images a call. Small models may gain nothing at 1, where they gain much at 16.
        rounds: timed calls of each, >= 2.
        warmup: calls of each before that.
        compare: measures; with the arguments and the result of `genprune.metrics.latency.compare_latency`.
    """

    batch_size: int = 1
    rounds: int = 10
    warmup: int = 2
    compare: Compare = field(default=compare_latency, repr=False)

    def __post_init__(self) -> None:
        checks.check_whole("batch_size", self.batch_size, 1)
        checks.check_whole("rounds", self.rounds, 2)
        checks.check_whole("warmup", self.warmup, 0)

    def measure(self, host: TokenHost, tried: Mapping[str, tuple[TokenMethod, Counts]]) -> LatencyComparison:
        """Times of the dense model, named `dense`, and of each method with its counts, scoring included.

        The model itself is not touched: copies that share its weights run.
        """
        with untouched(host.model), torch.inference_mode():
            dense, reduced = _sharing_copy(host.model), _sharing_copy(host.model)
            twin = twin_of(host, reduced)
            state = TokenState(next(iter(tried.values()))[0], len(twin.paths))
            attached = twin.attach(state)
            inputs = {name: self._batch(value) for name, value in host.example_inputs(dense).items()}
            calls = {"dense": _Call(dense, inputs)}
            for name, (method, counts) in tried.items():
                calls[name] = _Call(reduced, inputs, state, method, per_layer(counts, host))
            device = next(dense.parameters()).device
            timed = self.compare(calls, "dense", device=device, rounds=self.rounds, warmup=self.warmup)
            for hook in attached:
                hook.remove()
        return timed

    def _batch(self, value):
        """One example, `(1, ...)`, as a batch of noise where it is floating point."""
        if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != 1:
            return value
        value = value.expand(self.batch_size, *value.shape[1:])
        return torch.randn_like(value) if value.is_floating_point() and value.ndim > 1 else value.contiguous()


class _Call:
    """One call of a model; with a state, under that method and schedule."""

    def __init__(self, model: nn.Module, inputs: dict, state: TokenState | None = None, method=None, schedule=None):
        self.model, self.inputs, self.state, self.method, self.schedule = model, inputs, state, method, schedule

    def __call__(self):
        if self.state is not None:
            self.state.method, self.state.schedule = self.method, self.schedule
        return self.model(**self.inputs)


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A copy with the same weights, the same tensors in fact, and without token reduction."""
    memo = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, memo)
    take_off(twin)
    return twin


@dataclass(frozen=True)
class TimeModel:
    """Share of the dense time as a line: 1 + slope (MACs - 1) + each * layers, MACs as a share, scoring included.

    Args:
        slope: what a multiply-accumulate less saves; below 1 where something else than arithmetic takes time.
        each: what every layer that reduces costs beside its multiply-accumulates.
    """

    slope: float
    each: float

    def share(self, macs: float, layers: int) -> float:
        return 1 + self.slope * (macs - 1) + self.each * layers

    @classmethod
    def through(cls, points: Sequence[tuple[float, int, float]]) -> TimeModel:
        """Least squares through `(share of MACs, layers that reduce, measured share of the time)`."""
        rows = torch.tensor([[macs - 1, float(layers)] for macs, layers, _ in points], dtype=torch.float64)
        times = torch.tensor([time - 1 for _, _, time in points], dtype=torch.float64)[:, None]
        slope, each = torch.linalg.lstsq(rows, times, driver="gelsd").solution[:, 0].tolist()
        return cls(slope, each)
