"""The machine a number was measured on, in words."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def device_name(device: torch.device | str = "cpu") -> str:
    """E.g. `NVIDIA A100-SXM4-80GB` or the CPU's model name; a speed without it means nothing."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device.type} on {platform.machine()}"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("model name", "Hardware")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def synchronize(device: torch.device | str) -> None:
    """Wait for everything queued on an accelerator; nothing on the CPU."""
    device = torch.device(device)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
