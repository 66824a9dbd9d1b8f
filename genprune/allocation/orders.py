"""The allocations by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from genprune.allocation.global_ import global_order
from genprune.allocation.steps import Steps
from genprune.allocation.uniform import uniform_order

# Name -> order: (steps, additive) -> sort key of each step, ascending = goes first.
ALLOCATIONS: dict[str, Callable[[Steps, bool], Tensor]] = {"global": global_order, "uniform": uniform_order}
