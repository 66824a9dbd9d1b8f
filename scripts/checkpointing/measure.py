"""One case in this process: peak memory of one way at one length, or the times of all ways side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from genprune.families import denoiser
from scripts.chain.phases import measured
from scripts.checkpointing.hosts import SEED, Host, SigmoidGates, build_host, weight_bytes
from scripts.checkpointing.ways import WAYS, gradients


def run_memory(name: str, way: str, steps: int, latent_size: int, device: str) -> dict[str, Any]:
    """Peak memory and seconds of one forward and backward, beyond what the model and the libraries hold before."""
    host, gates = _prepared(name, latent_size, device)
    gradients(way, host, gates, 1)  # libraries load and pick their kernels
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, started = torch.cuda.memory_allocated(), time.perf_counter()
        gradients(way, host, gates, steps)
        torch.cuda.synchronize()
        phase = {
            "seconds": time.perf_counter() - started,
            "before_bytes": before,
            "extra_bytes": torch.cuda.max_memory_allocated() - before,
            "method": "torch.cuda.max_memory_allocated",
        }
    else:
        _, phase = measured(lambda: gradients(way, host, gates, steps))
    return {"host": name, "way": way, "steps": steps, "latent_size": latent_size, **phase} | {
        "model_bytes": weight_bytes(denoiser(host.pipe))
    }


def run_speed(name: str, steps: int, rounds: int, latent_size: int, device: str) -> dict[str, Any]:
    """All ways in turns, the order shifted by one each round; ratios within a round, medians over rounds."""
    host, gates = _prepared(name, latent_size, device)
    found, calls = {}, {}
    host.call  # noqa: B018  recorded before calls are counted
    for way in WAYS:  # warm up, and compare the gradients on the way
        with _Counter(denoiser(host.pipe)) as counter:
            found[way] = gradients(way, host, gates, steps)
        calls[way] = counter.count
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    names = list(WAYS)
    for index in range(rounds):
        for way in names[index % len(names) :] + names[: index % len(names)]:
            times[way].append(_timed(lambda way=way: gradients(way, host, gates, steps), device))
    forward, backward = _flops(host, gates)
    limit = (2 * forward + backward) / (forward + backward)
    result = {
        "host": name,
        "steps": steps,
        "rounds": rounds,
        "latent_size": latent_size,
        "forward_flops": forward,
        "backward_flops": backward,
        "limit": limit,
        "calls": calls,
        "seconds": {way: median(t[0] for t in times[way]) for way in WAYS},
        "gradient_relative_error": {way: _error(found[way], found["naive"]) for way in WAYS},
    }
    for place, unit in enumerate(("time", "cpu_time")):
        for way in ("ours", "step_checkpoints"):
            ratios = [mine[place] / plain[place] for mine, plain in zip(times[way], times["naive"])]
            result[f"{unit}_ratio_{way}"] = median(ratios)
            result[f"{unit}_ratios_{way}"] = ratios
    return result


def _prepared(name: str, latent_size: int, device: str) -> tuple[Host, SigmoidGates]:
    torch.manual_seed(SEED)
    host = build_host(name, latent_size, device)
    denoiser(host.pipe).requires_grad_(False)  # the same frozen base for every way
    return host, SigmoidGates(host.pipe)


class _Counter:
    def __init__(self, model: nn.Module):
        self.model, self.count = model, 0

    def hook(self, module, inputs) -> None:
        self.count += 1

    def __enter__(self) -> _Counter:
        self.handle = self.model.register_forward_pre_hook(self.hook)
        return self

    def __exit__(self, *error) -> None:
        self.handle.remove()


def _timed(run: Callable[[], Any], device: str) -> tuple[float, float]:
    """Seconds on the clock, and of this process on all its threads."""
    if device == "cuda":
        torch.cuda.synchronize()
    started, computed = time.perf_counter(), time.process_time()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - computed


def _flops(host: Host, gates: SigmoidGates) -> tuple[int, int]:
    """Floating-point operations of one denoiser call, forward and backward, with frozen weights.

    Attention is counted as two products forward and four backward, whatever kernel runs.
    """
    sample = host.call[host.sample_argument].detach().requires_grad_()
    gates.set_step(0)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            output = denoiser(host.pipe)(**host.call | {host.sample_argument: sample}, return_dict=False)[0]
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(output.sum(), [sample, *gates.parameters()])
    return forward, counter.get_total_flops()


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    one, other = (torch.cat([grad.double().flatten() for grad in grads]) for grads in (found, expected))
    return float((one - other).norm() / other.norm())
