"""One linear map per token or pixel in the place of a branch, a sub-layer or a whole block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from genprune.errors import GenpruneError, nearest
from genprune.operators.base import Operator, Ridge, blank, placement


class TokenMap(nn.Linear):
    """A linear layer of tokens `(..., in)`; maps `(B, in, H, W)` go through it as through a 1x1 convolution."""

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim == 4:
            return functional.conv2d(input, self.weight[:, :, None, None], self.bias)
        return functional.linear(input, self.weight, self.bias)


class LinearMap(Operator):
    """`y = W x + b` at every token or pixel, or `y = x + W x + b`, for each stream that the module returns.

    Settings:
        streams: one `[argument name, in, out]` for each item that the module returns, in that order; null for an item
            that it returns as None. Inputs of four dimensions are maps, channels first; others are tokens.
        returns: `"tensor"` (default; of one stream) or `"tuple"`, as the module hands them back.
        residual: the map is added to its input (default False). Zeros are then the module skipped.

    Values come from calibration data: ridge least squares from input to output, which covers whatever the module does
    to its output, such as `output_scale_factor`. The damping holds the map near nothing, or near the skipped module.

    Cost: `in out` per position.
    """

    name = "linear"
    options = ("streams", "returns", "residual")
    defaults = {"returns": "tensor", "residual": False}
    moments = "matrix"

    @classmethod
    def refuses(cls, removed: nn.Module) -> str | None:
        return "it has no forward of its own" if type(removed).forward is nn.Module.forward else None

    @classmethod
    def checked(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        settings = super().checked(settings)
        streams, residual = settings["streams"], settings["residual"]
        if not isinstance(streams, (list, tuple)) or not all(_is_stream(s) for s in streams) or not any(streams):
            raise GenpruneError(
                f"setting 'streams' of '{cls.name}' is {streams!r}; expected a list of [argument name, in, out] or "
                'null. Pass e.g. [["hidden_states", 320, 320]].'
            )
        if settings["returns"] not in ("tensor", "tuple") or (settings["returns"] == "tensor" and len(streams) != 1):
            raise GenpruneError(
                f"setting 'returns' of '{cls.name}' is {settings['returns']!r} for {len(streams)} streams; expected "
                "'tensor' for one stream, or 'tuple'. Pass what the module returns."
            )
        names = [stream[0] for stream in streams if stream]
        if not isinstance(residual, bool) or len(set(names)) != len(names):
            raise GenpruneError(
                f"'{cls.name}' got residual={residual!r} and streams {names}; expected True or False, and no name "
                "twice. Pass such settings."
            )
        if residual and any(stream and stream[1] != stream[2] for stream in streams):
            raise GenpruneError(
                f"'{cls.name}' got residual=True for {list(streams)}; expected as many outputs as inputs, because the "
                "map is added to its input. Pass residual=False."
            )
        return settings

    def layers(self, removed: nn.Module) -> nn.Module:
        place, maps = placement(removed), nn.ModuleDict()
        for name, wide, out in filter(None, self.settings["streams"]):
            if name not in self.argument_names:
                raise GenpruneError(
                    f"{type(removed).__name__} has no argument '{name}'{nearest(name, self.argument_names)}; expected "
                    f"one of {', '.join(self.argument_names)}. Name its stream by one of those."
                )
            maps[name] = blank(TokenMap, wide, out, **place)
        self.streams = tuple(stream[0] if stream else None for stream in self.settings["streams"])
        self.as_tuple, self.residual = self.settings["returns"] == "tuple", self.settings["residual"]
        return maps

    def maps(self) -> dict[str, tuple[int, int]]:
        return {name: (layer.in_features, layer.out_features) for name, layer in self.replacement.items()}

    def rows(self, given: Mapping[str, Any], output: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
        outputs = [output] if isinstance(output, Tensor) else output
        for name, value in zip(self.streams, outputs):
            inputs = given.get(name)
            if inputs is not None and value is not None:
                yield name, _as_rows(inputs), _as_rows(value - inputs if self.residual else value)

    @torch.no_grad()
    def fit(self, removed: nn.Module, moments: Mapping[str, Any], ridge: Ridge) -> None:
        for name, layer in self.replacement.items():
            weight, bias = ridge(moments[name], True)
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)

    def forward(self, *args, **kwargs) -> Tensor | tuple[Tensor | None, ...]:
        given = self.given(args, kwargs)
        outputs = tuple(self._mapped(name, given) for name in self.streams)
        return outputs if self.as_tuple else outputs[0]

    def _mapped(self, name: str | None, given: Mapping[str, Any]) -> Tensor | None:
        inputs = None if name is None else given.get(name)
        if inputs is None:
            return None
        mapped = self.replacement[name](inputs)
        return inputs + mapped if self.residual else mapped


def _is_stream(stream: Any) -> bool:
    if stream is None:
        return True
    if not isinstance(stream, (list, tuple)) or len(stream) != 3 or not isinstance(stream[0], str):
        return False
    return all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in stream[1:])


def _as_rows(activation: Tensor) -> Tensor:
    """Positions as rows, `(positions, features)`."""
    return (activation.movedim(1, -1) if activation.ndim == 4 else activation).flatten(0, -2)
