"""The random draws of a recovery, each a function of the seed and of a sample's global index.

Sample number `g` of the whole run (over all steps, micro-batches and processes) is the same whatever the number of
processes, and there is no random state to save.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

_PRIME = 1_000_003


def sample_indices(step: int, micro_batch: int, micro_batches: int, batch_size: int, rank: int, world: int) -> range:
    """Global indices of one process's rows: those of a step are consecutive over micro-batches and processes."""
    first = ((step * micro_batches + micro_batch) * world + rank) * batch_size
    return range(first, first + batch_size)


def generator_of(seed: int, index: int) -> torch.Generator:
    """The CPU generator of one sample: timestep, dropout and noise come from it in that order."""
    return torch.Generator("cpu").manual_seed((seed * _PRIME + index) * _PRIME % 2**63)


@dataclass
class Shuffled:
    """Which item of `size` a global sample index takes: each once an epoch, in an order of its own."""

    size: int
    seed: int
    _epoch: int = field(default=-1, repr=False)
    _order: list[int] = field(default_factory=list, repr=False)

    def item(self, index: int) -> int:
        epoch, position = divmod(index, self.size)
        if epoch != self._epoch:
            # another stream than that of the samples: negative numbers are never a sample's index
            generator = torch.Generator("cpu").manual_seed((self.seed * _PRIME - 1 - epoch) * _PRIME % 2**63)
            self._epoch, self._order = epoch, torch.randperm(self.size, generator=generator).tolist()
        return self._order[position]


def drawn_timestep(process, sampling: str, generator: torch.Generator) -> float:
    """A timestep in the scheduler's scale: a whole number for a diffusion process, any for flow matching.

    Args:
        process: `DiffusionProcess` or `FlowProcess`.
        sampling: `uniform`, or `logit_normal`, sigmoid(N(0, 1)) of the range, for flow matching.
    """
    if sampling == "logit_normal":
        share = torch.sigmoid(torch.randn((), generator=generator, dtype=torch.float64))
    else:
        share = torch.rand((), generator=generator, dtype=torch.float64)
    timestep = float(share) * process.train_timesteps
    if hasattr(process, "alphas_cumprod"):
        return float(min(int(timestep), process.train_timesteps - 1))
    return timestep


def min_snr_weight(alpha: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """Min-SNR weight of a timestep's prediction loss.

        epsilon: min(SNR, gamma) / SNR      v: min(SNR, gamma) / (SNR + 1)      sample: min(SNR, gamma)

    Args:
        alpha: `alphas_cumprod` at the timestep, in [0, 1]; SNR = alpha / (1 - alpha).

    Reference:
        Min-SNR (Hang et al., arXiv 2303.09556), section 3.4; all three weigh the error of x_0 alike.
    """
    snr = alpha / (1 - alpha)
    clamped = snr.clamp_max(gamma)
    if prediction_type == "sample":
        return clamped
    if prediction_type == "v_prediction":
        return clamped / (snr + 1)
    return (gamma / snr).clamp_max(1.0)  # the same as min / SNR, and 1 where there is no signal
