"""Calls of a model over whole denoising trajectories, recorded once and played again to measure activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from genprune.denoising.capture import DenoiserCall, capture_runs
from genprune.errors import BadCalibrationData, GenpruneError
from genprune.families import denoiser, denoiser_slot

STEP_WEIGHTS = (0.8, 1.2)  # of the last and the first step, as OBS-Diff has it


@dataclass(frozen=True)
class ModelCall:
    """One call of a model that can be played again, on it or on a changed copy.

    Attributes:
        inputs: keyword arguments, one positional tensor, or anything that `loss_fn` takes. On the CPU.
        weight: of the activations of this call.
        loss_fn: `loss_fn(model, inputs)` plays the call where it is given.
    """

    inputs: Any = field(repr=False)
    weight: float = 1.0
    loss_fn: Callable[[nn.Module, Any], Any] | None = field(default=None, repr=False)

    def on(self, device: torch.device) -> Any:
        """The inputs on a device."""
        return _moved(self.inputs, device)

    def play(self, model: nn.Module) -> None:
        """Run the model once; what it returns is not wanted."""
        if self.loss_fn is not None:
            self.loss_fn(model, self.inputs)
            return
        inputs = self.on(next(model.parameters()).device)
        if isinstance(inputs, Mapping):
            model(**inputs)
        else:
            model(inputs)


def step_weights(steps: int, low: float = STEP_WEIGHTS[0], high: float = STEP_WEIGHTS[1]) -> tuple[float, ...]:
    """The weight of each of T steps, in the order of sampling: `high` for the first and `low` for the last.

        alpha_t = low + (high - low) ln(T - t + 1) / ln(T),   t = 1 ... T

    Reference:
        OBS-Diff (arXiv 2510.06751): an error of an early step is carried through all that follow.
    """
    if steps == 1:
        return (high,)
    return tuple(low + (high - low) * math.log(steps - t + 1) / math.log(steps) for t in range(1, steps + 1))


def recorded_calls(
    target,
    prompts: Sequence[str] | None = None,
    data: Iterable | None = None,
    *,
    loss_fn: Callable[[nn.Module, Any], Any] | None = None,
    samples: int | None = None,
    steps: int = 20,
    timesteps: int | None = None,
    weights: tuple[float, float] = STEP_WEIGHTS,
    guidance_scale: float | None = None,
    batch_size: int = 4,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> list[ModelCall]:
    """Every call that a pipeline makes of its denoiser while it draws, or one call for each batch of a bare model.

    Args:
        target: a pipeline, or a bare model.
        prompts: calibration prompts of a text-to-image pipeline.
        data: for a bare model: batches, each a tensor, a dictionary of arguments, `(inputs, target)` with inputs of
            either sort, or anything with `loss_fn`.
        samples: images that the pipeline draws. Default: one per prompt, 16 without prompts.
        steps, guidance_scale, batch_size, seed: of the runs that draw them.
        timesteps: calls of a run to keep, spread evenly; None keeps all.
        weights: of the last and the first step, see `step_weights`.
        progress: show a progress bar.
        options: more of the pipeline's call, such as height and width.

    Returns:
        The calls, in order. What a run passes to all of its calls, such as the text, is held once.

    Raises:
        BadCalibrationData: prompts or data are missing or empty, or data are given for a pipeline.
    """
    if denoiser_slot(target) is None:
        return _own_calls(target, data, loss_fn)
    if data is not None or loss_fn is not None:
        raise BadCalibrationData(
            f"got data or a loss for a {type(target).__name__}, which records its own trajectories; expected prompts. "
            f"Pass prompts=[...], or the bare {type(denoiser(target)).__name__} with data=[inputs, ...]."
        )
    options |= {"steps": steps, "guidance_scale": guidance_scale, "batch_size": batch_size, "seed": seed}
    runs = capture_runs(target, prompts, samples=samples, **options)
    if progress:
        from tqdm.auto import tqdm

        count = samples or (len(prompts) if prompts else 16)
        runs = tqdm(runs, total=-(-count // batch_size), desc="drawing", unit="batch")
    calls = []
    for run in runs:
        every = step_weights(len(run.calls), *weights)
        kept = _spread(len(run.calls), timesteps)
        shared = _shared([run.calls[index] for index in kept])
        calls += [ModelCall(inputs, every[index]) for index, inputs in zip(kept, shared)]
    return calls


def _spread(count: int, wanted: int | None) -> list[int]:
    """Indices of `wanted` of `count` calls in the middles of equal parts; all of them for None."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return [int((index + 0.5) * count / wanted) for index in range(wanted)]


def _shared(calls: Sequence[DenoiserCall]) -> list[dict[str, Any]]:
    """The inputs of a run's calls, with equal tensors of neighbouring calls held once."""
    inputs: list[dict[str, Any]] = []
    for call in calls:
        before = inputs[-1] if inputs else {}
        inputs.append({name: _same_or(before.get(name), value) for name, value in call.inputs.items()})
    return inputs


def _same_or(before: Any, value: Any) -> Any:
    if isinstance(value, Tensor):
        same = isinstance(before, Tensor) and before.dtype == value.dtype and torch.equal(before, value)
        return before if same else value
    if isinstance(value, Mapping):
        held = before if isinstance(before, Mapping) else {}
        return {name: _same_or(held.get(name), item) for name, item in value.items()}
    return value


def _own_calls(model: nn.Module, data: Iterable | None, loss_fn) -> list[ModelCall]:
    advice = (
        "Pass data=[batch, ...], each a tensor, a dictionary of the model's arguments, or (inputs, target); any batch "
        "with loss_fn(model, batch); or the pipeline with prompts."
    )
    if data is None:
        raise BadCalibrationData(f"{type(model).__name__} is a bare model and got no data. {advice}")
    calls = []
    for count, batch in enumerate(data, start=1):
        if loss_fn is None and isinstance(batch, (tuple, list)) and batch:
            batch = batch[0]
        if loss_fn is None and not isinstance(batch, (Tensor, Mapping)):
            raise BadCalibrationData(f"batch {count} is a {type(batch).__name__} that genprune cannot read. {advice}")
        calls.append(ModelCall(batch, loss_fn=loss_fn))
    if not calls:
        raise BadCalibrationData(f"data holds no batch; expected at least one. {advice}")
    return calls


def check_step_weights(weights: tuple[float, float]) -> None:
    """Raises `GenpruneError` unless these are two weights above 0."""
    if len(weights) != 2 or not all(isinstance(w, (int, float)) and w > 0 for w in weights):
        raise GenpruneError(
            f"step_weights={weights!r}; expected two numbers above 0, of the last and the first step, as (0.8, 1.2)."
        )


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(item, device) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, device) for item in value)
    return value
