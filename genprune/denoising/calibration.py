"""Calibration batches from a pipeline and prompts, from latents or images, or from a user's own data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genprune.denoising.batches import DenoisingBatch, ImageBatch, LossBatch
from genprune.denoising.capture import Run, capture_runs, checked_prompts
from genprune.denoising.encoding import clean_latents, packed
from genprune.denoising.targets import forward_process, noise_for, spread_timesteps
from genprune.errors import BadCalibrationData
from genprune.families import denoiser, denoiser_slot, family_of

Batch = DenoisingBatch | ImageBatch | LossBatch


def calibration_batches(
    target,
    prompts: Sequence[str] | None = None,
    data: Any = None,
    *,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    timesteps: int | Sequence[int] = 8,
    samples: int | None = None,
    steps: int = 20,
    guidance_scale: float | None = None,
    batch_size: int = 4,
    seed: int = 0,
    **options: Any,
) -> Iterator[Batch]:
    """Batches for a gradient criterion, one at a time, so that memory does not grow with their number.

    Args:
        target: a pipeline, or a bare model.
        prompts: calibration prompts of a text-to-image pipeline.
        data: for a pipeline, clean latents `(n, C, h, w)` or images (`(n, 3, H, W)` in [0, 1], or PIL), one per
            prompt; without it the pipeline draws its own. For a bare model, an iterable of `(images, labels)`, of
            `(inputs, target)` with `inputs` a dictionary of the denoiser's arguments, or of anything for `loss_fn`.
        loss_fn: `loss_fn(model, batch) -> scalar`, for a bare model.
        timesteps: how many, spread evenly over the training range, or which ones.
        samples: images that a pipeline draws. Default: one per prompt, 16 without prompts.
        steps, guidance_scale: of the runs that draw them.
        batch_size: rows a batch.
        seed: of images and noise; the same seed gives the same batches, whatever the batch size.
        options: more of the pipeline's call, such as height and width.

    Yields:
        Batches with `rows`, `timestep` and `losses(model)`.

    Raises:
        BadCalibrationData: prompts or data are missing, empty, or do not fit each other or the model.
    """
    if denoiser_slot(target) is None:
        yield from _own_batches(target, data, loss_fn)
        return
    process = forward_process(target.scheduler)
    if isinstance(timesteps, int):
        timesteps = spread_timesteps(timesteps, process.train_timesteps)
    if outside := [t for t in timesteps if not 0 <= t < process.train_timesteps]:
        raise BadCalibrationData(
            f"timestep {outside[0]} is outside the training range 0 ... {process.train_timesteps - 1}. Pass timesteps "
            "inside it, or how many to spread over it."
        )
    options |= {"seed": seed, "guidance_scale": guidance_scale, "batch_size": batch_size, "keep": lambda i: i == 0}
    clean = None
    if data is None:
        runs = capture_runs(target, prompts, samples=samples, steps=steps, **options)
    else:
        clean, size = clean_latents(target, data)
        given = checked_prompts(target, prompts)
        if given is not None and len(given) != len(clean):
            raise BadCalibrationData(
                f"{len(given)} prompts for {len(clean)} latents or images; expected one prompt for each."
            )
        runs = capture_runs(target, given, samples=len(clean), steps=1, **options | size)
    for run in runs:
        start = run.latents if clean is None else packed(target, run, clean[run.first_sample :][: run.rows])
        for timestep in timesteps:
            yield _noised(target, run, start, process, timestep, seed)


def _noised(pipe, run: Run, clean: Tensor, process, timestep: float, seed: int) -> DenoisingBatch:
    """The run's conditions with its latents noised to one timestep."""
    model = denoiser(pipe)
    name = family_of(model).sample_argument
    inputs = conditions(run, name)
    sample = inputs.pop(name)
    if sample.shape != clean.shape:
        raise BadCalibrationData(
            f"{type(pipe).__name__} calls its denoiser with {tuple(sample.shape)}, its latents are "
            f"{tuple(clean.shape)}; expected the same shape. Pipelines with extra input channels (inpainting) cannot "
            "calibrate by themselves: pass the model with data=[(inputs, target), ...]."
        )
    device = getattr(pipe, "_execution_device", model.device)
    noised, target = process.noised(clean.float(), noise_for(clean, seed, run.first_sample, timestep), timestep)
    first_call = float(run.calls[0].timestep.flatten()[0])
    inputs["timestep"] = process.timestep_argument(timestep, run.rows, sample, first_call, float(run.timesteps[0]))
    inputs[name] = noised.to(sample.dtype)
    return DenoisingBatch(_moved(inputs, device), target.to(device), float(timestep))


def conditions(run: Run, sample_argument: str) -> dict[str, Any]:
    """The arguments of a run's first denoiser call, without the rows that classifier-free guidance added.

    Raises:
        BadCalibrationData: the call has neither one row an image nor two.
    """
    inputs = dict(run.calls[0].inputs)
    called = inputs[sample_argument].shape[0]
    if called == run.rows:
        return inputs
    if called != 2 * run.rows:
        raise BadCalibrationData(
            f"the denoiser was called with {called} rows for {run.rows} images; expected {run.rows}, or twice that "
            "under guidance. Pass guidance_scale=1."
        )
    half = slice(called // 2) if run.conditional_first else slice(called // 2, None)
    return {name: _half(value, called, half) for name, value in inputs.items()}


def _half(value: Any, called: int, half: slice) -> Any:
    """The conditional rows of every tensor with `called` rows."""
    if isinstance(value, Tensor):
        return value[half] if value.ndim and value.shape[0] == called else value
    if isinstance(value, Mapping):
        return {name: _half(item, called, half) for name, item in value.items()}
    return value


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(item, device) for name, item in value.items()}
    return value


def _own_batches(model: nn.Module, data: Iterable | None, loss_fn) -> Iterator[Batch]:
    """A user's batches for a bare model."""
    advice = (
        "Pass data=[(images, labels), ...] for a classifier, data=[(inputs, target), ...] with a dictionary of "
        "arguments for a denoiser, or any batches with loss_fn(model, batch); or pass the pipeline with prompts."
    )
    if data is None:
        raise BadCalibrationData(f"{type(model).__name__} is a bare model and got no data. {advice}")
    device = next(model.parameters()).device
    count = 0
    for count, batch in enumerate(data, start=1):
        if loss_fn is not None:
            yield LossBatch(batch, loss_fn)
            continue
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
            raise BadCalibrationData(f"batch {count} is a {type(batch).__name__} that genprune cannot read. {advice}")
        given, answer = batch
        if isinstance(given, Mapping):
            timestep = torch.as_tensor(given.get("timestep", 0.0)).float().mean()
            yield DenoisingBatch(_moved(given, device), answer.to(device), float(timestep))
        elif isinstance(given, Tensor):
            if answer.shape != given.shape[:1]:
                raise BadCalibrationData(
                    f"batch {count} has images {tuple(given.shape)} and labels {tuple(answer.shape)}; expected one "
                    f"label per image, ({given.shape[0]},). {advice}"
                )
            yield ImageBatch(given.to(device), answer.to(device))
        else:
            raise BadCalibrationData(f"batch {count} starts with a {type(given).__name__}. {advice}")
    if not count:
        raise BadCalibrationData(f"data holds no batch; expected at least one. {advice}")
