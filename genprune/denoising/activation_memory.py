"""How much memory the graphs of denoiser calls may take, and how much one of them takes."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from genprune.errors import GenpruneError

ONE_CALL = "one call"
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def memory_bytes(activation_memory: int | str) -> int | None:
    """The budget in bytes, or None for "one call". Raises `GenpruneError`."""
    if activation_memory == ONE_CALL:
        return None
    if isinstance(activation_memory, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)\s*", activation_memory.upper())
        value = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    else:
        value = activation_memory if type(activation_memory) is int else 0
    if value <= 0:
        raise GenpruneError(
            f'activation_memory is {activation_memory!r}; expected None, "{ONE_CALL}", or a size above 0 in bytes. '
            'Pass e.g. activation_memory="8GiB".'
        )
    return value


class SavedBytes:
    """A context manager that counts the bytes that autograd saves inside it, each storage once.

    Args:
        model: its parameters and buffers do not count, they are there anyway.
        inputs: tensors that do not count either.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...] = ()):
        self._passed = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers(), *inputs)}
        self._counted: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        return sum(self._counted.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        # The graph keeps the tensor, and so its address, for as long as we count.
        place = _storage(tensor)
        if place not in self._passed:
            self._counted[place] = tensor.untyped_storage().nbytes()
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._hooks.__exit__(*error)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class KeptGraphs:
    """Which of the last calls of a chain keep their graph, so that they need no second forward.

    The last ones, because backward reaches them first: their graphs are gone before the first call is recomputed, so
    that the two never add up.

    Args:
        budget_bytes: what graphs may take together, or None: no graph is kept.
    """

    def __init__(self, budget_bytes: int | None):
        self.budget_bytes = budget_bytes
        self.call_bytes: int | None = None
        self.kept = 0
        self.calls = 0

    @property
    def measures(self) -> bool:
        """Whether the call that comes is the one to measure: the first."""
        return self.budget_bytes is not None and self.call_bytes is None

    def measured(self, call_bytes: int, block_checkpointing: bool) -> None:
        """Take note of what one call saves. Raises `GenpruneError` where that alone is too much."""
        self.call_bytes = max(call_bytes, 1)
        if self.call_bytes > self.budget_bytes:
            advice = (
                "Pass fewer seeds at once, a smaller image, or more memory"
                if block_checkpointing
                else "Pass block_checkpointing=True, which keeps only what goes from block to block, or more memory"
            )
            raise GenpruneError(
                f"activation_memory is {self.budget_bytes / 2**20:,.1f} MiB, and one call of the denoiser saves "
                f"{self.call_bytes / 2**20:,.1f} MiB for its gradient; expected room for at least one call. {advice}."
            )

    def keep_next(self, step: int, steps: int) -> bool:
        """Whether the next call keeps its graph.

        Args:
            step: steps of the solver so far.
            steps: in the whole run.
        """
        index, self.calls = self.calls, self.calls + 1
        if step == 0:
            self._per_step = index + 1  # calls a step: known when the first step is over, which keeps no graph
            return False
        if self.budget_bytes is None:
            return False
        room = self.budget_bytes // self.call_bytes
        # A guess too high where guidance pauses: then fewer are kept. `kept < room` guards against one too low.
        if index >= self._per_step * steps - room and self.kept < room:
            self.kept += 1
            return True
        return False
