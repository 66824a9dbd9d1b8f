"""How a plan's masks lie on disk: bits in one tensor, and what a damaged file is told."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from genprune.errors import PlanMismatch


def packed_bits(mask: Tensor) -> Tensor:
    """Eight entries of a bool vector in a byte, the first in its lowest bit: uint8 of shape `(ceil(n / 8),)`."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.numel() % 8)).reshape(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpacked_bits(packed: Tensor, count: int) -> Tensor:
    """The first `count` bits of `packed_bits`, bool of shape `(count,)`."""
    return ((packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()[:count].bool()


def read_text(path: Path) -> str:
    """The JSON text of a plan. Raises `PlanMismatch` for a file that holds none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise PlanMismatch(f"'{path}' is not a text file; expected the JSON that plan.save writes.") from None


def read_tensors(path: Path) -> tuple[Tensor, dict[str, Tensor], dict[str, str]]:
    """Packed masks, the tensors of operations, and the metadata. Raises `PlanMismatch` for a damaged file."""
    from safetensors import SafetensorError, safe_open

    bits, extra = torch.zeros(0, dtype=torch.uint8), {}
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            for key in file.keys():
                if key == "keep":
                    bits = file.get_tensor(key)
                else:
                    extra[key.removeprefix("tensor.")] = file.get_tensor(key)
    except SafetensorError as error:
        raise PlanMismatch(
            f"'{path}' is not a whole safetensors file ({error}). Make the plan again, or restore the file."
        ) from None
    return bits, extra, metadata
