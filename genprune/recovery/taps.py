"""Features of a model at named modules, caught by plain forward hooks while the model is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genprune.errors import NoMatchingSites, nearest


class FeatureTaps:
    """Catches what modules return during one call; `remove()`, or leaving the context, takes the hooks off.

    Outside of `open` and `close` hooks catch nothing: a block that gradient checkpointing computes again in the
    backward pass adds nothing.

    Args:
        model: the model that is called.
        paths: module paths, in the order in which features come back.

    Raises:
        NoMatchingSites: the model has no module of that path.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        self.caught: dict[str, tuple[Tensor, ...]] | None = None
        modules = dict(model.named_modules())
        if missing := [path for path in self.paths if path not in modules]:
            raise NoMatchingSites(
                f"no module '{missing[0]}' in {type(model).__name__}{nearest(missing[0], modules)}; expected a path "
                "of model.named_modules(). Correct `pairs`, or leave it out."
            )
        self.handles = [modules[path].register_forward_hook(TapHook(self, path)) for path in dict.fromkeys(self.paths)]

    def open(self) -> None:
        """Begin to catch."""
        self.caught = {}

    def close(self) -> list[tuple[Tensor, ...]]:
        """The features of each path since `open`: one tensor, or one a stream. Catches nothing from here on."""
        caught, self.caught = self.caught or {}, None
        return [caught.get(path, ()) for path in self.paths]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def __enter__(self) -> FeatureTaps:
        return self

    def __exit__(self, *error) -> None:
        self.remove()


class TapHook:
    """Forward hook of one module."""

    def __init__(self, taps: FeatureTaps, path: str) -> None:
        self.taps, self.path = taps, path

    def __call__(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        if self.taps.caught is not None:
            self.taps.caught[self.path] = streams(output)


def streams(output: Any) -> tuple[Tensor, ...]:
    """The feature tensors of a module's output: itself, or each tensor of a tuple (both streams of a joint block).

    Tuples inside are no features: a down block of a U-Net returns its skips that way.
    """
    if isinstance(output, Tensor):
        return (output,)
    if hasattr(output, "sample"):  # a `Transformer2DModelOutput`
        return (output.sample,)
    return tuple(item for item in output if isinstance(item, Tensor)) if isinstance(output, (tuple, list)) else ()


class TappedModel(nn.Module):
    """A model whose call returns its prediction, its features and the log-variances of the loss terms.

    One module whose output holds everything that the loss reads: what data parallelism needs to see.

    Args:
        model: the student. Hooks sit on it until `remove`.
        paths: taps.
        terms: how many terms have a learned log-variance; 0: none.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], terms: int = 0) -> None:
        super().__init__()
        self.model, self.taps = model, FeatureTaps(model, paths)
        self.log_variances = None
        if terms:
            device = next(model.parameters()).device
            self.log_variances = nn.Parameter(torch.zeros(terms, device=device))

    def forward(self, rows: Any) -> tuple[Tensor, tuple[tuple[Tensor, ...], ...], Tensor | None]:
        """`rows.predict(model)` with the taps open."""
        self.taps.open()
        try:
            prediction = rows.predict(self.model)
        finally:
            features = self.taps.close()
        weights = None if self.log_variances is None else self.log_variances * 1
        return prediction, tuple(features), weights
