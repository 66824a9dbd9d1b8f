"""Allocation: scores, costs and a budget become the units that stay. One file an allocation, registered by name.

Every allocation is a removal *order* of legal steps; `fit` walks it until the budget is met. Because the order does
not depend on the budget, plans for a smaller budget contain those for a larger one.
"""

from __future__ import annotations

from genprune.allocation.fit import fit
from genprune.allocation.orders import ALLOCATIONS
from genprune.allocation.request import Request, default_kinds

__all__ = ["ALLOCATIONS", "Request", "default_kinds", "fit"]
