"""Second moments of what layers are given, streamed through hooks over recorded calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from genprune.denoising.replay import ModelCall
from genprune.errors import BadCalibrationData, UnsupportedModel
from genprune.sites import GatePoint, Site, Sites

PACKAGE_BYTES = 4 << 30  # of Gram matrices held at a time, where no number of layers is given
_UNFOLDED = 1 << 25  # entries of a convolution's unfolded input at a time


def consumers(sites: Sites) -> dict[str, list[tuple[Site, GatePoint]]]:
    """The layers at whose input units are gated: module path -> the sites gated there and where, in site order.

    A joint attention has two such layers, and the last projection of a Flux single block has two such sites.
    """
    found: dict[str, list[tuple[Site, GatePoint]]] = {}
    for site in sites.values():
        for point in site.gates:
            if point.side == "input" and point.width > 0:
                found.setdefault(point.module, []).append((site, point))
    return found


def weight_matrix(layer: nn.Module) -> Tensor:
    """The weight as a matrix `(out, features)` in float64; a convolution's feature is one channel at one tap."""
    return layer.weight.detach().flatten(1).double()


def taps(layer: nn.Module) -> int:
    """Features that one input channel of the layer has: 1, or the number of taps of a convolution's kernel."""
    return layer.weight[0, 0].numel()


def check_consumer(path: str, layer: nn.Module) -> None:
    """Raises `UnsupportedModel` for a layer whose output is no matrix times features."""
    plain = isinstance(layer, nn.Linear) and layer.weight.shape == (layer.out_features, layer.in_features)
    if isinstance(layer, nn.Conv2d):
        plain = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if not plain or not layer.weight.is_floating_point():
        raise UnsupportedModel(
            f"'{path}' is a {type(layer).__name__} with a weight of {layer.weight.dtype}; expected a plain Linear or "
            "an ungrouped, zero-padded Conv2d. Measure it before it is quantised or wrapped by an adapter."
        )


def features(layer: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
    """What a layer's weight matrix multiplies, `(positions, features)`, float32 or wider, in parts of few rows.

    Args:
        inputs: of a linear layer `(..., features)`; of a convolution `(B, C, H, W)`, unfolded a few images at a time,
            because they grow as many times larger as the kernel has taps.
    """
    inputs = inputs.detach()
    inputs = inputs.float() if inputs.dtype.itemsize < 4 else inputs
    if isinstance(layer, nn.Linear):
        yield inputs.reshape(-1, inputs.shape[-1])
        return
    for images in inputs.split(max(1, _UNFOLDED // max(1, inputs[0].numel() * taps(layer)))):
        columns = functional.unfold(images, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        yield columns.transpose(1, 2).flatten(0, 1)  # (b * h * w, C * taps), channels outside


def outputs_as_rows(layer: nn.Module, outputs: Tensor) -> Tensor:
    """A layer's output with one row for each of `features`' rows, `(positions, out)`."""
    return (outputs if isinstance(layer, nn.Linear) else outputs.movedim(1, -1)).reshape(-1, layer.weight.shape[0])


@dataclass
class Moments:
    """Weighted means over positions of a layer's features x, in float64.

        second = sum_c a_c sum_p x x^T / sum_c a_c n_c,   mean = sum_c a_c sum_p x / sum_c a_c n_c

    over calls c of weight a_c and their n_c positions (tokens, pixels) p. OBS-Diff's `H` is `2 * second`.
    """

    second_sum: Tensor = field(repr=False)
    first_sum: Tensor = field(repr=False)
    weight: float = 0.0
    positions: int = 0

    @classmethod
    def zeros(cls, size: int, device: torch.device | str) -> Moments:
        make = {"dtype": torch.float64, "device": device}
        return cls(torch.zeros(size, size, **make), torch.zeros(size, **make))

    def add(self, rows: Tensor, weight: float = 1.0) -> None:
        """Add positions `(n, features)`."""
        self.second_sum += (rows.T @ rows).double() * weight
        self.first_sum += rows.sum(0, dtype=torch.float64) * weight
        self.weight += weight * len(rows)
        self.positions += len(rows)

    @property
    def second(self) -> Tensor:
        """`E[x x^T]`, shape `(features, features)`."""
        return self.second_sum / self.weight

    @property
    def mean(self) -> Tensor:
        """`E[x]`, shape `(features,)`."""
        return self.first_sum / self.weight

    @property
    def covariance(self) -> Tensor:
        """`E[x x^T] - E[x] E[x]^T`."""
        return self.second - torch.outer(self.mean, self.mean)


class InputObserver:
    """Adds what a layer is given to its moments; a plain hook held by an object."""

    def __init__(self, layer: nn.Module):
        self.layer, self.weight = layer, 1.0
        self.moments = Moments.zeros(layer.weight[0].numel(), layer.weight.device)
        self._handle = layer.register_forward_pre_hook(self.hook)

    def hook(self, module: nn.Module, inputs: tuple) -> None:
        for rows in features(module, inputs[0]):
            self.moments.add(rows, self.weight)

    def remove(self) -> None:
        self._handle.remove()


def packages(model: nn.Module, paths: Sequence[str], modules_per_pass: int | None = None) -> list[list[str]]:
    """The layers in groups that are measured in one pass over the calls: of that many, or of a few GB of Grams."""
    groups: list[list[str]] = []
    held = 0
    for path in paths:
        size = 8 * model.get_submodule(path).weight[0].numel() ** 2
        full = bool(groups) and (
            held + size > PACKAGE_BYTES if modules_per_pass is None else len(groups[-1]) == modules_per_pass
        )
        if not groups or full:
            groups.append([])
            held = 0
        groups[-1].append(path)
        held += size
    return groups


@torch.no_grad()
def input_moments(
    model: nn.Module,
    paths: Sequence[str],
    calls: Iterable[ModelCall],
    modules_per_pass: int | None = None,
    progress: bool = False,
) -> Iterator[tuple[str, Moments]]:
    """The moments of each layer's input, one layer after another: memory is that of one package.

    Args:
        model: in evaluation mode, on its device.
        paths: of linear layers and convolutions.
        calls: played once for every package.
        modules_per_pass: layers a package; None: as many as fit in 4 GB of Grams.

    Raises:
        UnsupportedModel: a layer is neither. BadCalibrationData: a layer never ran.
    """
    for path in paths:
        check_consumer(path, model.get_submodule(path))
    groups = packages(model, paths, modules_per_pass)
    for number, group in enumerate(groups, start=1):
        observers: dict[str, InputObserver] = {}
        try:
            for path in group:
                observers[path] = InputObserver(model.get_submodule(path))
            for call in shown(calls, f"activations {number}/{len(groups)}", progress):
                for observer in observers.values():
                    observer.weight = call.weight
                call.play(model)
        finally:
            for observer in observers.values():
                observer.remove()
        for path in group:
            moments = observers.pop(path).moments
            if not moments.positions:
                raise BadCalibrationData(
                    f"'{path}' never ran on the calibration data; expected every layer with units to. Calibrate on "
                    "inputs like those that the model will be used with, or protect its sites."
                )
            yield path, moments


def shown(calls: Iterable, what: str, progress: bool, unit: str = "call") -> Iterable:
    """The calls, or anything else, with a bar that counts them where one is wanted."""
    if not progress:
        return calls
    from tqdm.auto import tqdm

    return tqdm(calls, desc=what, unit=unit)
