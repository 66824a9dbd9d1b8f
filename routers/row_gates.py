"""Gates that differ from row to row of a batch: every picture under the code of its own prompt, at full cost."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genprune.errors import PlanMismatch
from genprune.families import denoiser, family_of
from genprune.gates import GateHandle, attach_gates
from genprune.sites import Sites


class RowGates:
    """Puts one set of gates on each row of a denoiser's batch; a context manager that leaves no hook behind.

    Rows come as prompts do in a stock pipeline: the pictures of one prompt side by side, and under guidance the whole
    batch a second time. The number of copies is read off each call, so that joint calls (SD, SDXL, SD3) and separate
    ones (FLUX's true guidance) are both right.

    Args:
        target: the model or its pipeline.
        sites: `find_sites(target)`, when at hand.
    """

    def __init__(self, target: Any, sites: Sites | None = None) -> None:
        self.model = denoiser(target)
        self.sites = sites
        self._rows: dict[str, Tensor] = {}
        self._copies = 0
        self._handle: GateHandle | None = None
        name = family_of(self.model).sample_argument
        self._place = name, list(inspect.signature(type(self.model).forward).parameters)[1:].index(name)

    def set(self, gates: Mapping[str, Tensor], rows: Sequence[int] | Tensor, images_per_prompt: int = 1) -> None:
        """Give the rows their gates.

        Args:
            gates: site name -> `(K, size)`, 1 keeps; gradients pass.
            rows: which of the K each prompt has, shape `(prompts,)`.
            images_per_prompt: rows that each prompt has, side by side.
        """
        picked = torch.as_tensor(rows, dtype=torch.long).repeat_interleave(images_per_prompt)
        self._rows = {name: values[picked.to(values.device)] for name, values in gates.items()}
        self._copies = 0  # set with the next call

    def open(self) -> None:
        """No gates: the dense model, to the bit."""
        self._detach()
        self._rows = {}

    def __enter__(self) -> RowGates:
        self._hook = self.model.register_forward_pre_hook(self.hook, with_kwargs=True)
        return self

    def __exit__(self, *error) -> None:
        self._hook.remove()
        self._detach()

    def hook(self, module: nn.Module, inputs: tuple, kwargs: dict) -> None:
        """Spread the rows over this call's batch."""
        if not self._rows:
            return
        name, index = self._place
        sample = kwargs[name] if name in kwargs else inputs[index]
        rows = next(iter(self._rows.values())).shape[0]
        copies, rest = divmod(sample.shape[0], rows)
        if rest or not copies:
            raise PlanMismatch(
                f"gates are set for {rows} rows, the denoiser is called with {sample.shape[0]}; expected a multiple. "
                "Pass the number of pictures of each prompt as images_per_prompt."
            )
        if copies == self._copies:
            return
        spread = {name: values.repeat(copies, 1) for name, values in self._rows.items()}
        self._copies = copies
        if self._handle is None:
            self._handle = attach_gates(self.model, spread, self.sites)
            return
        for name, values in spread.items():
            self._handle[name] = values

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._copies = 0
