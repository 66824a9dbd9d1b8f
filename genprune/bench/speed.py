"""How fast the candidates are beside each other: one denoiser call, and the whole pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from genprune.bench.sampling import Sampling, call_arguments
from genprune.families import denoiser
from genprune.metrics.latency import LatencyComparison, compare_latency


@torch.no_grad()
def compare_speed(
    pipelines: Mapping[str, object],
    reference: str,
    prompt: str,
    sampling: Sampling,
    device: torch.device | str = "cpu",
    rounds: int = 10,
    batch: int = 1,
    steps: int | None = None,
) -> dict[str, LatencyComparison]:
    """Time every candidate in turns, so that ratios survive a busy machine.

    Args:
        pipelines: candidate -> loaded pipeline, all on `device` at once.
        reference: the candidate that ratios are against.
        prompt: drawn in every call.
        sampling: settings; one seed throughout.
        device: where the pipelines are.
        rounds: timed rounds.
        batch: images a call; with guidance the denoiser sees twice as many rows.
        steps: denoising steps of a pipeline call; default: those of `sampling`.

    Returns:
        `denoiser`: one call of the unet or transformer on the inputs it really gets in the first step.
        `pipeline`: a call from prompt to picture.
    """
    sampling = dataclasses.replace(sampling, num_inference_steps=steps or sampling.num_inference_steps)
    args, kwargs = _denoiser_inputs(pipelines[reference], prompt, sampling, batch)

    def step(pipeline):
        model = denoiser(pipeline)
        return lambda: model(*args, **kwargs)

    def draw(pipeline):
        return lambda: pipeline(**call_arguments(pipeline, sampling, range(batch), [prompt] * batch))

    quiet = {name: dict(getattr(pipeline, "_progress_bar_config", {})) for name, pipeline in pipelines.items()}
    for name, pipeline in pipelines.items():
        pipeline.set_progress_bar_config(**{**quiet[name], "disable": True})
    try:
        return {
            "denoiser": compare_latency(
                {name: step(pipeline) for name, pipeline in pipelines.items()}, reference, device, rounds
            ),
            "pipeline": compare_latency(
                {name: draw(pipeline) for name, pipeline in pipelines.items()},
                reference,
                device,
                rounds=max(3, rounds // 3),
                warmup=1,
            ),
        }
    finally:
        for name, pipeline in pipelines.items():
            pipeline.set_progress_bar_config(**quiet[name])


def _denoiser_inputs(pipeline, prompt: str, sampling: Sampling, batch: int) -> tuple[tuple, dict]:
    """What the pipeline hands its denoiser in the first step, recorded by a hook that is removed again."""
    caught: list[tuple[tuple, dict]] = []

    def catch(_module, args, kwargs):
        caught.append((args, kwargs))

    handle = denoiser(pipeline).register_forward_pre_hook(catch, with_kwargs=True)
    short = dataclasses.replace(sampling, num_inference_steps=2)  # some schedulers refuse a single step
    quiet = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**{**quiet, "disable": True})
    try:
        pipeline(**call_arguments(pipeline, short, range(batch), [prompt] * batch), output_type="latent")
    finally:
        handle.remove()
        pipeline.set_progress_bar_config(**quiet)
    args, kwargs = caught[0]
    return tuple(_copy(item) for item in args), {name: _copy(item) for name, item in kwargs.items()}


def _copy(value):
    return value.clone() if isinstance(value, torch.Tensor) else value
