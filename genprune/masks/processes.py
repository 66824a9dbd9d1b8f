"""The processes of a data-parallel mask training: logits are few, so their gradients are summed by hand."""

from __future__ import annotations

import torch
from torch import Tensor


def process_rank() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) outside of a `torch.distributed` group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def averaged(value: float, device: torch.device) -> float:
    """The mean over all processes: what each measured by itself may differ in the last digits."""
    world = process_rank()[1]
    if world == 1:
        return value
    return float(summed([torch.tensor([value], dtype=torch.float64, device=device)])[0]) / world


def summed(tensors: list[Tensor]) -> list[Tensor]:
    """Each tensor summed over all processes, in one message."""
    if process_rank()[1] == 1:
        return tensors
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    torch.distributed.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]
