"""What an operator costs in its place: parameters, and multiply-accumulates at the operating point."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from genprune.costs import ModuleCosts, meta_copy
from genprune.denoising.replay import ModelCall
from genprune.families import OperatingPoint, family_of
from genprune.layers.menu import Given, observed
from genprune.operators import build_operator


class OperatorCosts:
    """Counts operators on the meta device, each on the inputs that its place has at the operating point.

    Args:
        model: on any device; not touched.
        point: where MACs are counted.
        paths: of the modules that operators may replace.
    """

    def __init__(self, model: nn.Module, point: OperatingPoint, paths: Iterable[str]):
        self.meta = meta_copy(model)
        inputs = family_of(model).example_inputs(self.meta, point, "meta", torch.float32)
        self.seen: dict[str, Given] = observed(self.meta, dict.fromkeys(paths), ModelCall(inputs))

    def of(self, path: str, operator: str, settings: Mapping[str, Any]) -> ModuleCosts:
        """Params and MACs of the operator itself; no MACs where its place never runs."""
        from torch.utils.flop_counter import FlopCounterMode

        with torch.device("meta"):
            module = build_operator(operator, self.meta.get_submodule(path), settings).to("meta").float()
        params = sum(parameter.numel() for parameter in module.parameters())
        if path not in self.seen:
            return ModuleCosts(params, 0)
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            module(**self.seen[path].arguments)
        return ModuleCosts(params, counter.get_total_flops() // 2)
