"""Record what a stock pipeline calls its denoiser with. The pipeline itself runs; nothing of it is copied."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from genprune.errors import BadCalibrationData, GenpruneError, nearest
from genprune.families import OperatingPoint, denoiser, denoiser_slot


@dataclass(frozen=True)
class DenoiserCall:
    """One call of the denoiser, detached.

    Attributes:
        inputs: arguments by name, as the pipeline passed them.
        output: the prediction.
    """

    inputs: Mapping[str, Any] = field(repr=False)
    output: Tensor = field(repr=False)

    @property
    def timestep(self) -> Tensor:
        """The timestep argument, in the denoiser's own scale."""
        return torch.as_tensor(self.inputs["timestep"])


@dataclass(frozen=True)
class Run:
    """One run of the pipeline over a batch of prompts.

    Attributes:
        rows: images in the batch.
        latents: what came out: final latents as the denoiser sees them, or images in [-1, 1] where there is no VAE.
        calls: the recorded calls, in order.
        timesteps: the scheduler's timesteps in this run, shape `(steps,)`.
        first_sample: index of row 0 among all samples.
        conditional_first: whether guidance calls the denoiser with the conditional rows first, as DiT's pipeline does;
            the others put the unconditional ones there.
    """

    rows: int
    latents: Tensor = field(repr=False)
    calls: tuple[DenoiserCall, ...] = field(repr=False)
    timesteps: Tensor = field(repr=False)
    first_sample: int = 0
    conditional_first: bool = False


class CallRecorder:
    """Records calls of a denoiser while it is attached; a context manager that leaves no hook behind.

    Args:
        model: the denoiser.
        keep: which calls, by their index in the run; None keeps all.
        device: where recorded tensors go.
    """

    def __init__(
        self, model: nn.Module, keep: Callable[[int], bool] | None = None, device: str | torch.device = "cpu"
    ):
        self.model, self.keep, self.device = model, keep, device
        self.names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self.calls: list[DenoiserCall] = []
        self.seen = 0

    def hook(self, module: nn.Module, inputs: tuple, kwargs: dict, output) -> None:
        index, self.seen = self.seen, self.seen + 1
        if self.keep is not None and not self.keep(index):
            return
        given = dict(zip(self.names, inputs)) | kwargs
        given.pop("return_dict", None)
        prediction = output[0] if isinstance(output, tuple) else output.sample
        self.calls.append(DenoiserCall(_detached(given, self.device), _detached(prediction, self.device)))

    def __enter__(self) -> CallRecorder:
        self._handle = self.model.register_forward_hook(self.hook, with_kwargs=True)
        return self

    def __exit__(self, *error) -> None:
        self._handle.remove()


def _detached(value: Any, device: str | torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, Mapping):
        return {name: _detached(item, device) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_detached(item, device) for item in value)
    return value


def takes_prompts(pipe) -> bool:
    """Whether a pipeline is called with text."""
    return "prompt" in inspect.signature(type(pipe).__call__).parameters


def takes_labels(pipe) -> bool:
    """Whether a pipeline is called with class labels."""
    return "class_labels" in inspect.signature(type(pipe).__call__).parameters


class LastLatents:
    """What a scheduler's last step returned: final latents of pipelines that decode whatever they are asked for."""

    def __init__(self, scheduler):
        self.step, self.latents = scheduler.step, None
        functools.update_wrapper(self, scheduler.step)  # pipelines read from its signature what a solver takes
        scheduler.step = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.step(*args, **kwargs)
        self.latents = output[0] if isinstance(output, tuple) else output.prev_sample
        return output


def capture_runs(
    pipe,
    prompts: Sequence | None = None,
    *,
    samples: int | None = None,
    seed: int = 0,
    steps: int = 20,
    guidance_scale: float | None = None,
    batch_size: int = 4,
    keep: Callable[[int], bool] | None = None,
    device: str | torch.device = "cpu",
    **options: Any,
) -> Iterator[Run]:
    """Run a stock pipeline over prompts and yield its final latents and the denoiser's calls, batch by batch.

    The pipeline object, its scheduler and its progress bar are not changed: a shallow copy runs.

    Args:
        pipe: a diffusers pipeline.
        prompts: one per sample; repeated in order until there are `samples`. Class labels for a pipeline that draws by
            them; None for an unconditional pipeline.
        samples: images to draw. Default: one per prompt, 16 without prompts.
        seed: image `i` starts from a generator seeded with `seed + i`, whatever the batch size.
        steps, guidance_scale: passed on; None leaves the pipeline's default.
        batch_size: images a run, >= 1.
        keep: which denoiser calls of a run to record, by index from 0. Default: all.
        device: where recorded tensors go.
        options: more of the pipeline's call, such as height and width. A negative prompt is one string for all.

    Yields:
        `Run`, in sample order.

    Raises:
        BadCalibrationData: prompts are missing, empty or of another type.
        GenpruneError: an option that the pipeline does not have.
    """
    if denoiser_slot(pipe) is None:
        raise BadCalibrationData(
            f"{type(pipe).__name__} is a bare model; expected a pipeline that can draw. Pass the pipeline, or "
            "data=[(inputs, target), ...] for the model."
        )
    prompts = checked_prompts(pipe, prompts)
    samples = samples or (len(prompts) if prompts else 16)
    accepted = inspect.signature(type(pipe).__call__).parameters
    if prompts is None and "batch_size" not in accepted:
        raise BadCalibrationData(
            f"{type(pipe).__name__} draws neither from prompts, class labels nor without any; expected one of those. "
            f"Pass the bare {type(denoiser(pipe)).__name__} with data=[(inputs, target), ...]."
        )
    for name in options:
        # a pipeline without a size of its own draws what its model is made for
        if name not in accepted and name not in ("height", "width"):
            raise GenpruneError(
                f"{type(pipe).__name__} has no option '{name}'{nearest(name, accepted)}; expected one of its call's."
            )
    options |= {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    options = {name: value for name, value in options.items() if value is not None and name in accepted}
    latent, labelled = "vae" in getattr(pipe, "components", {}), takes_labels(pipe)
    for first in range(0, samples, batch_size):
        rows = min(batch_size, samples - first)
        generators = [torch.Generator("cpu").manual_seed(seed + first + row) for row in range(rows)]
        given = {"generator": generators, "output_type": "latent" if latent else "pt"}
        chosen = [prompts[(first + row) % len(prompts)] for row in range(rows)] if prompts else None
        given |= {"batch_size": rows} if chosen is None else {"class_labels" if labelled else "prompt": chosen}
        quiet = quiet_copy(pipe)
        last = LastLatents(quiet.scheduler)
        with CallRecorder(denoiser(pipe), keep, device) as recorder:
            output = quiet(**given, **for_rows(options, rows))
        if labelled or not hasattr(output, "images"):
            latents = last.latents[:rows].detach().to(device)  # DiT steps both halves of guidance
        else:
            images = output.images.detach().to(device)
            latents = images if latent else images * 2 - 1
        timesteps = quiet.scheduler.timesteps.detach().cpu()
        yield Run(rows, latents, tuple(recorder.calls), timesteps, first, conditional_first=labelled)


def for_rows(options: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Options of a pipeline's call, with a negative prompt that is one string repeated for each row."""
    return {
        name: [value] * rows if name.startswith("negative_prompt") and isinstance(value, str) else value
        for name, value in options.items()
    }


def check_not_settings(options: Mapping[str, Any], settings: Iterable[str], owner: str) -> None:
    """Raises `GenpruneError` for an option of a pipeline's call that is decided by a setting of the caller's.

    Args:
        settings: names that `owner` takes itself.
        owner: as a user writes it, such as `gp.OBS`.
    """
    decided = {name: name for name in settings}
    if "steps" in decided:
        decided["num_inference_steps"] = "steps"
    for name, value in options.items():
        if name in decided:
            raise GenpruneError(
                f"the pipeline option {name}={value!r} is a setting of {owner}; expected it there. Pass "
                f"{owner}({decided[name]}={value!r})."
            )


def image_size(pipe, point: OperatingPoint) -> dict[str, int]:
    """Height and width in image pixels that give a pipeline's denoiser its operating point; {} for a bare model."""
    factor = getattr(pipe, "vae_scale_factor", None)
    return {} if factor is None else {"height": point.height * factor, "width": point.width * factor}


def checked_prompts(pipe, prompts: Sequence | None) -> list | None:
    """What a pipeline is told to draw: text, class labels, or None for an unconditional one.

    Raises:
        BadCalibrationData: missing, empty or of the wrong type.
    """
    name = type(pipe).__name__
    if takes_labels(pipe):
        labels = [] if prompts is None else list(prompts)
        wrong = [label for label in labels if isinstance(label, bool) or not isinstance(label, int)]
        if wrong or not labels:
            found = f"{wrong[0]!r}" if wrong else "none"
            raise BadCalibrationData(
                f"{name} draws by class label, got {found}; expected whole numbers. Pass e.g. prompts=[207, 360]."
            )
        return labels
    if not takes_prompts(pipe):
        return None
    advice = 'Pass e.g. prompts=["a red fox in the snow", ...], captions like those that the model will be used with.'
    if prompts is None or isinstance(prompts, str) or len(prompts) == 0:
        found = "none" if prompts is None or not prompts else "one string"
        raise BadCalibrationData(
            f"{name} needs calibration prompts, got {found}; expected a list of strings. {advice}"
        )
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise BadCalibrationData(f"prompts[{index}] is {prompt!r}; expected a string with text in it. {advice}")
    return list(prompts)


def quiet_copy(pipe):
    """A pipeline with the same components, a scheduler of its own, and no progress bar."""
    quiet = copy.copy(pipe)
    quiet.scheduler = copy.deepcopy(pipe.scheduler)
    quiet._progress_bar_config = {"disable": True}
    return quiet
