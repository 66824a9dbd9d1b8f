"""The conditions that a pipeline gives its denoiser, encoded once for each prompt, kept and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from genprune.denoising.calibration import conditions
from genprune.denoising.capture import Run, capture_runs
from genprune.errors import BadCalibrationData
from genprune.families import denoiser, family_of

_PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Conditions:
    """Arguments of the denoiser other than sample and timestep, flat: nested names are joined by `/`.

    Args:
        rows: name -> tensor `(prompts, ...)`.
        shared: name -> what every row gets.
        negative: name -> tensor `(1, ...)` of the negative prompt, as guidance uses it; empty where the pipeline ran
            without guidance.
        first_call, first_timestep: the first timestep as the denoiser and as the scheduler had it: their ratio is the
            scale of the timestep argument.
        layout: the shape of one row of the sample, and `packed` is whether latents are packed into tokens.
        dtype: of the sample.
    """

    rows: dict[str, Tensor] = field(repr=False)
    shared: dict[str, Any] = field(repr=False)
    negative: dict[str, Tensor] = field(repr=False)
    first_call: float
    first_timestep: float
    layout: tuple[int, ...]
    dtype: torch.dtype

    def of(self, prompts: Sequence[int], dropped: Sequence[bool]) -> dict[str, Any]:
        """Keyword arguments for these prompts, those that are dropped with the negative condition."""
        flat = dict(self.shared)
        for name, values in self.rows.items():
            picked = [self.negative[name][0] if drop else values[index] for index, drop in zip(prompts, dropped)]
            flat[name] = torch.stack(picked)
        return nested(flat)


def flattened(inputs: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested arguments by joined names. Raises `BadCalibrationData` for what is neither tensor nor plain value."""
    flat = {}
    for name, value in inputs.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}/")
        elif isinstance(value, (Tensor, *_PLAIN)):
            flat[prefix + name] = value
        else:
            raise BadCalibrationData(
                f"the pipeline gives its denoiser '{prefix}{name}' as a {type(value).__name__}; expected tensors, "
                "numbers and words. Pass the bare models with data=[(inputs, target), ...]."
            )
    return flat


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `flattened`."""
    inputs: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        place = inputs
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return inputs


def encode_conditions(
    pipe, prompts: Sequence[str] | None, *, batch_size: int, seed: int, guidance_scale: float | None, **options: Any
) -> tuple[Conditions, Run]:
    """Run one denoising step of the stock pipeline for every prompt, and keep what its denoiser was called with.

    Args:
        prompts: each once; None for an unconditional pipeline.
        options: more of the pipeline's call, such as height and width.

    Returns:
        The conditions, and a run of one row, which tells the layout of its latents.
    """
    name = family_of(denoiser(pipe)).sample_argument
    options |= {"seed": seed, "steps": 1, "guidance_scale": guidance_scale, "keep": lambda index: index < 2}
    first = None if prompts is None else prompts[:1]
    one = next(capture_runs(pipe, first, samples=1, batch_size=1, **options))
    two = next(capture_runs(pipe, first, samples=2, batch_size=2, **options))
    single, double = (_without_sample(conditions(run, name), name) for run in (one, two))
    # what grows with the batch belongs to a row; everything else, such as position ids, to all
    by_row = [
        key
        for key, value in single.items()
        if isinstance(value, Tensor) and value.ndim and (value.shape[0], double[key].shape[0]) == (1, 2)
    ]
    encoded: dict[str, list[Tensor]] = {key: [] for key in by_row}
    if by_row:
        runs = capture_runs(pipe, prompts, samples=len(prompts or ()) or 1, batch_size=batch_size, **options)
        for run in runs:
            inputs = _without_sample(conditions(run, name), name)
            for key in by_row:
                encoded[key].append(inputs[key])
    sample = one.calls[0].inputs[name]
    return Conditions(
        rows={key: torch.cat(parts) for key, parts in encoded.items()},
        shared={key: value for key, value in single.items() if key not in by_row},
        negative={key: value for key, value in _negative(one, name).items() if key in by_row},
        first_call=float(one.calls[0].timestep.flatten()[0]),
        first_timestep=float(one.timesteps[0]),
        layout=tuple(sample.shape[1:]),
        dtype=sample.dtype,
    ), one


def _without_sample(inputs: Mapping[str, Any], sample_argument: str) -> dict[str, Any]:
    return flattened({key: value for key, value in inputs.items() if key not in (sample_argument, "timestep")})


def _negative(run: Run, sample_argument: str) -> dict[str, Any]:
    """The unconditional rows of guidance: half of a joint call, or the second of two calls on one sample."""
    first = run.calls[0].inputs
    sample = first[sample_argument]
    if sample.shape[0] == 2 * run.rows:
        halves = flattened(first)
        half = slice(run.rows, None) if run.conditional_first else slice(run.rows)
        return {
            key: value[half]
            for key, value in halves.items()
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == 2 * run.rows
        }
    if len(run.calls) == 2:
        other = run.calls[1].inputs
        if torch.equal(sample, other[sample_argument]):
            return {key: value for key, value in flattened(other).items() if isinstance(value, Tensor)}
    return {}
