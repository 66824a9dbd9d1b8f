"""Three ways to differentiate a chain of denoiser calls by its gates; each gives the final latents with a graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from genprune.denoising import draw_latents
from genprune.families import denoiser
from scripts.checkpointing.hosts import SEED, Host, SigmoidGates


def ours(host: Host, gates: SigmoidGates, steps: int) -> Tensor:
    return draw_latents(host.pipe, seeds=[SEED], gates=gates, num_inference_steps=steps, **host.options)


def naive(host: Host, gates: SigmoidGates, steps: int) -> Tensor:
    """The graph of everything."""
    memory = {"activation_memory": None}
    return draw_latents(host.pipe, seeds=[SEED], gates=gates, num_inference_steps=steps, **memory, **host.options)


def step_checkpoints(host: Host, gates: SigmoidGates, steps: int) -> Tensor:
    """`torch.utils.checkpoint` around each whole solver step, in a loop written for the host, as one would by hand."""
    model, solver, name = denoiser(host.pipe), host.pipe.scheduler, host.sample_argument
    latents = host.call[name][:1]
    flow = name == "hidden_states"
    if flow:
        solver.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=latents.device)
    else:
        solver.set_timesteps(steps, device=latents.device)

    def step(index: int, latents: Tensor) -> Tensor:
        gates.set_step(index)
        time = solver.timesteps[index]
        sample = torch.cat([latents] * host.rows)
        timestep = (time / 1000 if flow else time).expand(host.rows)
        prediction = model(**host.call | {name: sample, "timestep": timestep}, return_dict=False)[0]
        if flow:  # Euler, written out: the solver's own step() counts, which a recompute would break
            return latents + (solver.sigmas[index + 1] - solver.sigmas[index]) * prediction
        plain, conditional = prediction.chunk(2)
        return solver.step(
            plain + host.options["guidance_scale"] * (conditional - plain), time, latents, return_dict=False
        )[0]

    for index in range(steps):
        latents = checkpoint(step, index, latents, use_reentrant=False)
    return latents


WAYS: dict[str, Callable[[Host, SigmoidGates, int], Tensor]] = {
    "naive": naive,
    "step_checkpoints": step_checkpoints,
    "ours": ours,
}


def gradients(way: str, host: Host, gates: SigmoidGates, steps: int) -> list[Tensor]:
    """The gradient of the latents' mean square by each logit."""
    latents = WAYS[way](host, gates, steps)
    return list(torch.autograd.grad(latents.square().mean(), gates.parameters()))
