"""Seconds and peak memory of one phase in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from genprune.metrics import peak_memory


def measured(run: Callable[[], Any]) -> tuple[Any, dict[str, float | str]]:
    """What `run()` returns, and its seconds, resident memory before it and the most in use meanwhile.

    Where the kernel lets a process reset its own high-water mark (Linux) the peak is exact, else it is sampled.
    `cpu_seconds` is what this process computed, on all threads: it does not grow when neighbours are busy.
    """
    answer: list[Any] = []
    exact = _reset_high_water_mark()
    before = _status("VmRSS") if exact else 0
    started, computed = time.perf_counter(), time.process_time()
    if exact:
        answer.append(run())
    else:
        memory = peak_memory(lambda: answer.append(run()))
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - computed
    if exact:
        peak, how = _status("VmHWM"), "kernel high-water mark"
    else:
        before, peak, how = memory.before_bytes, memory.peak_bytes, memory.method
    return answer[0], {
        "seconds": round(seconds, 4),
        "cpu_seconds": round(cpu_seconds, 4),
        "before_bytes": before,
        "peak_bytes": peak,
        "extra_bytes": max(0, peak - before),
        "method": how,
    }


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")
