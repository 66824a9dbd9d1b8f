"""Peak memory: the allocator's on CUDA, the process's resident set on the CPU.

Two different things, so a result names the method. On CUDA it is what torch's allocator handed out, exact, without the
context's own few hundred MB. On the CPU it is the resident set (libraries, weights and activations); pages that a
process once touched and the allocator kept are counted again for nobody, so a clean figure for one model needs a
fresh process: `genprune.bench.memory` does that, `peak_memory` samples within this one.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from genprune.metrics.device import device_name, synchronize
from genprune.metrics.errors import need


@dataclass(frozen=True)
class PeakMemory:
    """Memory around one call.

    Attributes:
        before_bytes: in use when the call began (the weights, and on the CPU the libraries).
        peak_bytes: the most in use during the call, `before_bytes` included.
        method: `cuda-allocator`, `rss-sampled` or `rss-peak-fresh-process`.
        device: in words.
    """

    before_bytes: int
    peak_bytes: int
    method: str
    device: str

    @property
    def extra_bytes(self) -> int:
        return self.peak_bytes - self.before_bytes

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


def rss_bytes() -> int:
    """Resident set of this process now."""
    return need("psutil").Process().memory_info().rss


def peak_rss_bytes() -> int:
    """Largest resident set of this process since it started.

    On Linux `VmHWM`, which belongs to this program alone; `ru_maxrss` there is inherited across fork and exec from
    whoever started the process, so a large parent would hide a small child.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def peak_memory(run: Callable[[], object], device: torch.device | str = "cpu", interval_ms: float = 2.0) -> PeakMemory:
    """Peak memory while `run()` runs in this process.

    Args:
        run: the work.
        device: `cuda` reads (and resets) the allocator's peak; anything else samples the resident set from a thread.
        interval_ms: between samples; a spike shorter than this can be missed. Not used on CUDA.
    """
    device = torch.device(device)
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return PeakMemory(before, torch.cuda.max_memory_allocated(device), "cuda-allocator", device_name(device))

    done = threading.Event()
    before = rss_bytes()
    peak = before

    def sample() -> None:
        nonlocal peak
        while not done.wait(interval_ms / 1000):
            peak = max(peak, rss_bytes())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        run()
        peak = max(peak, rss_bytes())
    finally:
        done.set()
        sampler.join()
    return PeakMemory(before, peak, "rss-sampled", device_name(device))
