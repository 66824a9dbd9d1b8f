"""Noised inputs and their targets: what the denoiser was trained to predict, for any scheduler's forward process."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from genprune.errors import BadCalibrationData


@dataclass(frozen=True)
class DiffusionProcess:
    """`x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise` with `a = alphas_cumprod`: DDPM, DDIM, PNDM, Euler, DPM-Solver, ...

    Schedulers that rescale their input (Euler) call the denoiser with exactly this `x_t`.

    Args:
        alphas_cumprod: shape `(train_timesteps,)`.
        prediction_type: `epsilon`, `v_prediction` or `sample`.
    """

    alphas_cumprod: Tensor = field(repr=False)
    prediction_type: str

    @property
    def train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def noised(self, clean: Tensor, noise: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        """The denoiser's input and target, both of the shape of `clean`, for an integer timestep."""
        alpha = self.alphas_cumprod[int(timestep)].to(clean.device, torch.float32)
        signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
        sample = signal * clean + sigma * noise
        targets = {"epsilon": noise, "v_prediction": signal * noise - sigma * clean, "sample": clean}
        return sample, targets[self.prediction_type]

    def timestep_argument(self, timestep: float, rows: int, like: Tensor, first_call: float, first: float) -> Tensor:
        """What the denoiser takes as `timestep`: whole numbers, shape `(rows,)`."""
        return torch.full((rows,), int(timestep), device=like.device)


@dataclass(frozen=True)
class FlowProcess:
    """`x_t = (1 - s) x_0 + s noise` with `s = t / train_timesteps`; the target is the velocity `noise - x_0`."""

    train_timesteps: int

    def noised(self, clean: Tensor, noise: Tensor, timestep: float) -> tuple[Tensor, Tensor]:
        """The denoiser's input and target, both of the shape of `clean`."""
        sigma = timestep / self.train_timesteps
        return (1 - sigma) * clean + sigma * noise, noise - clean

    def timestep_argument(self, timestep: float, rows: int, like: Tensor, first_call: float, first: float) -> Tensor:
        """What the denoiser takes as `timestep`, shape `(rows,)`: `t`, or `t / train_timesteps` as Flux does.

        Args:
            first_call, first: the first timestep as the pipeline passed it on and as its scheduler had it; their
                ratio tells the scale.
        """
        scale = 1.0 if first_call > 0.5 * first else 1 / self.train_timesteps
        return torch.full((rows,), timestep * scale, device=like.device, dtype=like.dtype)


def forward_process(scheduler) -> DiffusionProcess | FlowProcess:
    """How a scheduler's models were trained: the forward process and the kind of target.

    Raises:
        BadCalibrationData: the scheduler is neither DDPM-like nor flow matching.
    """
    config = scheduler.config
    prediction = config.get("prediction_type", "epsilon")
    flow = "FlowMatch" in type(scheduler).__name__ or config.get("use_flow_sigmas") or prediction == "flow_prediction"
    if flow:
        return FlowProcess(int(config.num_train_timesteps))
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None or prediction not in ("epsilon", "v_prediction", "sample"):
        raise BadCalibrationData(
            f"{type(scheduler).__name__} with prediction_type='{prediction}' has no forward process that genprune "
            "knows; expected a DDPM-like scheduler (epsilon, v_prediction, sample) or flow matching. Set "
            "pipe.scheduler to the one that the model was trained with, such as DDPMScheduler."
        )
    return DiffusionProcess(torch.as_tensor(alphas).cpu(), prediction)


def spread_timesteps(count: int, train_timesteps: int) -> tuple[int, ...]:
    """`count` timesteps in the middles of equal parts of the training range, ascending."""
    return tuple(int((index + 0.5) * train_timesteps / count) for index in range(count))


def noise_for(clean: Tensor, seed: int, first_sample: int, timestep: float) -> Tensor:
    """Gaussian noise of the shape of `clean`: drawn on the CPU per sample and timestep, whatever the batching."""
    rows = []
    for row in range(clean.shape[0]):
        mixed = (seed * 1_000_003 + first_sample + row) * 1_000_003 + round(timestep * 1000)
        generator = torch.Generator("cpu").manual_seed(mixed % 2**63)
        rows.append(torch.randn(clean.shape[1:], generator=generator))
    return torch.stack(rows).to(clean.device)
