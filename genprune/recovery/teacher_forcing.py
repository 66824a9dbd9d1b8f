"""What layers of a partly cut model lack beside the dense one, on the same inputs: for compensation in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from genprune.denoising.activations import features, outputs_as_rows
from genprune.denoising.replay import ModelCall
from genprune.errors import BadCalibrationData
from genprune.recovery.least_squares import Residual


class _Recorded:
    """What a layer returned in the dense run, one entry for each time that it ran."""

    def __init__(self, layer: nn.Module):
        self.layer, self.outputs = layer, []
        self._handle = layer.register_forward_hook(self.hook)

    def hook(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.outputs.append(outputs_as_rows(module, output.detach()))

    def remove(self) -> None:
        self._handle.remove()


class _Compared:
    """Sums of `x x^T`, `r x^T`, `x`, `r` and `||r||^2` over positions, x being what is kept of the layer's input.

        r = y_dense - (y - W_R x_R)

    with y what the layer returns now, on its whole input, and `W_R x_R` what of it will go. The layers of a package
    are measured before any of them loses its units: otherwise a layer would make up for what an earlier one of the
    same package is about to make up for itself.
    """

    def __init__(self, layer: nn.Module, kept: Tensor):
        self.layer, self.kept, self.gone = layer, kept, ~kept
        self.weight_gone = layer.weight.detach().flatten(1)[:, ~kept].T  # (R, out)
        make = {"dtype": torch.float64, "device": layer.weight.device}
        count, out = int(kept.sum()), layer.weight.shape[0]
        self.second, self.cross = torch.zeros(count, count, **make), torch.zeros(out, count, **make)
        self.first, self.lack = torch.zeros(count, **make), torch.zeros(out, **make)
        self.energy, self.total, self.positions, self.weight = 0.0, 0.0, 0, 1.0
        self.expected: list[Tensor] = []

    def attach(self) -> None:
        """After the gates of earlier packages, so that this hook sees what they leave."""
        self._handle = self.layer.register_forward_hook(self.hook)

    def remove(self) -> None:
        self._handle.remove()

    def hook(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        lacking = (self.expected.pop(0) - outputs_as_rows(module, output.detach())).float()  # (positions, out)
        start = 0
        for rows in features(module, inputs[0]):
            part = lacking[start : start + len(rows)] + rows[:, self.gone] @ self.weight_gone.to(rows.dtype)
            start += len(rows)
            part, rows = part.to(rows.dtype), rows[:, self.kept]
            self.second += (rows.T @ rows).double() * self.weight
            self.cross += (part.T @ rows).double() * self.weight
            self.first += rows.sum(0, dtype=torch.float64) * self.weight
            self.lack += part.sum(0, dtype=torch.float64) * self.weight
            self.energy += float(part.double().square().sum()) * self.weight
        self.total += self.weight * start
        self.positions += start

    def residual(self) -> Residual:
        n = self.total
        return Residual(self.second / n, self.cross / n, self.first / n, self.lack / n, self.energy / n)


@torch.no_grad()
def residuals(
    model: nn.Module,
    kept: Mapping[str, Tensor],
    calls: Iterable[ModelCall],
    dense: Callable[[], AbstractContextManager],
    present: Callable[[], AbstractContextManager],
) -> dict[str, tuple[Residual, int]]:
    """Each layer's residual between the dense and the present model, both called with the dense trajectory's inputs.

    Args:
        model: in evaluation mode.
        kept: layer -> features that stay, bool of shape `(features,)`: one package.
        calls: each played twice.
        dense, present: the model is dense inside the one context, and in the other it is compensated and gated as far
            as it is by now, this package not included.

    Returns:
        Layer -> its residual, and the number of positions that it was measured on.

    Raises:
        BadCalibrationData: a layer never ran.
    """
    layers = {path: model.get_submodule(path) for path in kept}
    compared = {path: _Compared(layer, kept[path].to(layer.weight.device)) for path, layer in layers.items()}
    for call in calls:
        recorded = {}
        try:
            with dense():
                recorded |= {path: _Recorded(layer) for path, layer in layers.items()}
                call.play(model)
        finally:
            for each in recorded.values():
                each.remove()
        with present():
            for path, each in compared.items():
                each.expected, each.weight = recorded[path].outputs, call.weight
                each.attach()
            try:
                call.play(model)
            finally:
                for each in compared.values():
                    each.remove()
    for path, each in compared.items():
        if not each.positions:
            raise BadCalibrationData(
                f"'{path}' never ran on the calibration data; expected every layer with units to. Calibrate on inputs "
                "like those that the model will be used with, or leave its sites whole."
            )
    return {path: (each.residual(), each.positions) for path, each in compared.items()}


@torch.no_grad()
def in_execution_order(model: nn.Module, paths: Sequence[str], call: ModelCall) -> list[str]:
    """The layers in the order in which they first run; those that do not run come last, as they were."""
    order: dict[str, None] = {}
    handles = [
        model.get_submodule(path).register_forward_hook(lambda *ignored, path=path: order.setdefault(path))
        for path in paths
    ]
    try:
        call.play(model)
    finally:
        for handle in handles:
            handle.remove()
    return [*order, *(path for path in paths if path not in order)]
