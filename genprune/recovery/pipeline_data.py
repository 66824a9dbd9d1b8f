"""What a pipeline's denoiser is recovered on: clean latents and conditions, noised row by row."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genprune.denoising.capture import capture_runs, checked_prompts
from genprune.denoising.encoding import clean_latents, packed
from genprune.denoising.targets import FlowProcess, forward_process
from genprune.errors import BadCalibrationData, GenpruneError
from genprune.families import denoiser, denoiser_slot, family_of
from genprune.recovery.conditions import Conditions, encode_conditions
from genprune.recovery.distillation import NormalizedDistillation
from genprune.recovery.draws import Shuffled, drawn_timestep, generator_of, min_snr_weight
from genprune.recovery.latent_cache import load_latents, save_latents
from genprune.recovery.rows import NoisedRows


@dataclass
class PipelineData:
    """Clean latents with their conditions; `rows` noises those of some global sample indices.

    Args:
        process: the scheduler's forward process.
        clean: shape `(n, ...)` in the denoiser's layout, float32.
        prompt_of: index into the conditions of each latent.
        noise_range: [low, high), the part of the training timesteps that is drawn from, as shares of them.
    """

    process: Any
    clean: Tensor = field(repr=False)
    prompt_of: Sequence[int] = field(repr=False)
    conditions: Conditions = field(repr=False)
    sample_argument: str
    settings: NormalizedDistillation
    fingerprint: str
    noise_range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        self.order = Shuffled(len(self.clean), self.settings.seed)

    def part(self, rows: Sequence[int], noise_range: tuple[float, float] = (0.0, 1.0)) -> PipelineData:
        """The same data with these of its latents alone, at timesteps of this range; conditions are shared.

        Raises:
            GenpruneError: no timestep is in the range.
        """
        low, high = noise_range
        count = self.process.train_timesteps
        whole = isinstance(self.process, FlowProcess) or math.ceil(low * count) < high * count
        if not (0 <= low < high <= 1 and whole):
            raise GenpruneError(
                f"noise_range={noise_range!r} has none of the {count} training timesteps; expected 0 <= low < high <= "
                "1 with some between. Pass wider bounds."
            )
        told = [self.fingerprint, list(rows), list(noise_range)]
        return replace(
            self,
            clean=self.clean[list(rows)],
            prompt_of=[self.prompt_of[row] for row in rows],
            fingerprint=hashlib.sha256(json.dumps(told).encode()).hexdigest(),
            noise_range=tuple(noise_range),
        )

    def rows(self, indices: Iterable[int]) -> NoisedRows:
        """Noised rows and their targets, on the CPU: everything drawn per sample."""
        settings, process, conditions = self.settings, self.process, self.conditions
        samples, targets, timesteps, prompts, dropped, weights = [], [], [], [], [], []
        like = torch.empty(0, dtype=conditions.dtype)
        for index in indices:
            generator, item = generator_of(settings.seed, index), self.order.item(index)
            timestep = self._timestep(generator)
            dropped.append(float(torch.rand((), generator=generator)) < settings.prompt_dropout)
            clean = self.clean[item]
            noise = torch.randn(clean.shape, generator=generator)
            sample, target = process.noised(clean, noise, timestep)
            samples.append(sample)
            targets.append(target)
            prompts.append(self.prompt_of[item])
            timesteps.append(
                process.timestep_argument(timestep, 1, like, conditions.first_call, conditions.first_timestep)
            )
            if settings.min_snr_gamma is not None:
                alpha = process.alphas_cumprod[int(timestep)].double()
                weights.append(min_snr_weight(alpha, process.prediction_type, settings.min_snr_gamma).float())
        inputs = conditions.of(prompts, dropped)
        inputs |= {self.sample_argument: torch.stack(samples), "timestep": torch.cat(timesteps)}
        return NoisedRows(inputs, torch.stack(targets), torch.stack(weights) if weights else None)

    def prompt_indices(self, indices: Iterable[int]) -> list[int]:
        """Of the rows of these sample indices: which of the distinct prompts each has, in order of appearance."""
        return [self.prompt_of[self.order.item(index)] for index in indices]

    def noise_levels(self, indices: Iterable[int]) -> list[float]:
        """Of the same rows: their timestep as a share of the training timesteps, in [0, 1]; 1 is noise."""
        drawn = (self._timestep(generator_of(self.settings.seed, index)) for index in indices)
        return [timestep / self.process.train_timesteps for timestep in drawn]

    def _timestep(self, generator: torch.Generator) -> float:
        """Drawn again until it is in the range: the first draw where that is everything."""
        low, high = self.noise_range
        while True:
            timestep = drawn_timestep(self.process, self.settings.timestep_sampling, generator)
            if low <= timestep / self.process.train_timesteps < high or (low, high) == (0.0, 1.0):
                return timestep


def pipeline_data(
    target: Any,
    teacher: Any,
    settings: NormalizedDistillation,
    prompts: Sequence[str] | None,
    data: Any,
    options: Mapping[str, Any],
    cache: str | os.PathLike | None = None,
    progress: bool = False,
    writes: bool = True,
) -> PipelineData:
    """Latents of the user's data, or drawn by the teacher, and the conditions of their prompts.

    Args:
        target, teacher: one of them is a pipeline; the teacher's is used where both are.
        data: clean latents `(n, C, h, w)`, images `(n, 3, H, W)` in [0, 1] or PIL images, one a prompt; None: the
            teacher draws.
        options: more of the pipeline's call, such as height and width.
        cache: a folder that keeps latents and conditions, and gives them back where they are of the same run.
        writes: whether this process writes there.

    Raises:
        BadCalibrationData: prompts and data do not fit, or there is nothing to draw with. GenpruneError: a setting
        that this scheduler or pipeline cannot serve.
    """
    pipe = teacher if denoiser_slot(teacher) is not None else target
    process = forward_process(pipe.scheduler)
    _check_settings(settings, process, pipe)
    if data is None and pipe is not teacher:
        raise BadCalibrationData(
            f"got prompts alone, and the teacher is a bare {type(teacher).__name__} that cannot draw; expected data, "
            "or a teacher pipeline. Pass data=latents, or the dense pipeline as teacher."
        )
    prompts = checked_prompts(pipe, prompts)
    described = _description(pipe, settings, prompts, data, options)
    kept = load_latents(cache, described) if cache is not None else None
    if kept is None:
        kept = _made(pipe, settings, prompts, data, dict(options), progress)
        if cache is not None and writes:
            save_latents(cache, described, *kept)
    clean, prompt_of, conditions = kept
    if settings.prompt_dropout and conditions.rows and not conditions.negative:
        raise GenpruneError(
            f"prompt_dropout={settings.prompt_dropout}, and {type(pipe).__name__} ran without guidance, so that it "
            "has no negative condition; expected one. Set prompt_dropout=0, or turn it on: teacher_guidance=5, or "
            'pipeline_options={"true_cfg_scale": 2, "negative_prompt": ""} for Flux.'
        )
    name = family_of(denoiser(pipe)).sample_argument
    text = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    return PipelineData(process, clean, prompt_of, conditions, name, settings, text)


def _check_settings(settings: NormalizedDistillation, process: Any, pipe: Any) -> None:
    flow = isinstance(process, FlowProcess)
    if flow and settings.min_snr_gamma is not None:
        raise GenpruneError(
            f"min_snr_gamma={settings.min_snr_gamma}, and {type(pipe).__name__} is trained by flow matching, whose "
            "velocity loss has no such weight; expected None. Leave it out, or pass timestep_sampling='logit_normal', "
            "which weighs timesteps there."
        )
    if not flow and settings.timestep_sampling != "uniform":
        raise GenpruneError(
            f"timestep_sampling='{settings.timestep_sampling}', and {type(pipe).__name__} is no flow-matching "
            "pipeline; expected 'uniform'. Leave it out, or pass min_snr_gamma=5, which weighs timesteps there."
        )


def _made(
    pipe: Any, settings: NormalizedDistillation, prompts: list[str] | None, data: Any, options: dict, progress: bool
) -> tuple[Tensor, list[int], Conditions]:
    """Clean latents, the prompt of each, and the conditions of every prompt."""
    clean = None
    if data is not None:
        clean, size = clean_latents(pipe, data)
        options |= size
        if prompts is not None and len(prompts) != len(clean):
            raise BadCalibrationData(
                f"{len(prompts)} prompts for {len(clean)} latents or images; expected one for each. Pass one a sample."
            )
    unique = None if prompts is None else list(dict.fromkeys(prompts))
    run = {"batch_size": settings.batch_size, "seed": settings.seed, "guidance_scale": settings.teacher_guidance}
    conditions, one = encode_conditions(pipe, unique, **run, **options)
    if clean is None:
        drawn = []
        count = settings.samples or (len(prompts) if prompts else 16)
        drawing = capture_runs(
            pipe, prompts, samples=count, steps=settings.teacher_steps, keep=lambda index: False, **run, **options
        )
        for each in _bar(drawing, -(-count // settings.batch_size), progress):
            drawn.append(each.latents)
        clean = torch.cat(drawn)
    else:
        clean = packed(pipe, one, clean)
    if tuple(clean.shape[1:]) != conditions.layout:
        raise BadCalibrationData(
            f"{type(pipe).__name__} calls its denoiser with rows of {conditions.layout}, its latents have "
            f"{tuple(clean.shape[1:])}; expected the same. Pipelines with extra input channels (inpainting) cannot "
            "recover by themselves: pass the bare models with data=[(inputs, target), ...]."
        )
    given = [None] if prompts is None else prompts
    places = {prompt: index for index, prompt in enumerate(dict.fromkeys(given))}
    return clean.float(), [places[given[index % len(given)]] for index in range(len(clean))], conditions


def _bar(runs: Iterable, total: int, shown: bool):
    from tqdm.auto import tqdm

    return tqdm(runs, total=total, desc="drawing", unit="batch", disable=not shown)


def _description(
    pipe: Any, settings: NormalizedDistillation, prompts: list[str] | None, data: Any, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What latents and conditions depend on, as JSON has it."""
    names = ("samples", "teacher_steps", "teacher_guidance", "seed")
    return {
        "pipeline": type(pipe).__name__,
        "settings": {name: getattr(settings, name) for name in names},
        "prompts": prompts,
        "options": {name: repr(value) for name, value in sorted(options.items())},
        "data": None if data is None else _hash(data),
    }


def _hash(data: Any) -> str:
    digest = hashlib.sha256()
    for item in data:
        if isinstance(item, Tensor):
            item = item.detach().cpu().float().contiguous().numpy()
        digest.update(item.tobytes() if hasattr(item, "tobytes") else repr(item).encode())
    return digest.hexdigest()


def cache_folder(output_dir: str | os.PathLike | None) -> Path | None:
    """Where a run keeps latents and conditions."""
    return None if output_dir is None else Path(output_dir) / "teacher_data"
