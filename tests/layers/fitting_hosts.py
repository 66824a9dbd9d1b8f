"""Models, calls and the naive reference that the tests of closed-form fits share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genprune.denoising.replay import ModelCall
from genprune.families import family_of
from genprune.layers.fitting import fitted

FLOAT64 = {"rtol": 1e-4, "atol": 1e-4}  # moments are products in float32, solved in float64


def calls_of(model: nn.Module, count: int = 3, **given: int) -> list[ModelCall]:
    """Calls of different weights, with inputs of their own."""
    family = family_of(model)
    point = family.operating_point(model, **({"batch": 2} | given))
    dtype = next(model.parameters()).dtype
    calls = []
    for seed in range(count):
        torch.manual_seed(seed)
        calls.append(ModelCall(family.example_inputs(model, point, "cpu", dtype), weight=1.0 + 0.5 * seed))
    return calls


def randomised(model: nn.Module) -> nn.Module:
    """Weights of unit gain everywhere, so that modulations and zero-initialised layers do something."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
            elif parameter.std() < 0.05:
                parameter.copy_(torch.randn(parameter.shape) * parameter[0].numel() ** -0.5)
    return model.eval()


class Plain(nn.Module):
    """Any module as a model that is called with one tensor."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, inputs: Tensor) -> Tensor:
        return self.part(inputs)


def batches(*shape: int, count: int = 4) -> list[ModelCall]:
    torch.manual_seed(1)
    scale = torch.linspace(0.05, 2, shape[-1])
    return [ModelCall(torch.randn(shape) * scale + 0.3, weight=1.0 + 0.5 * i) for i in range(count)]


def one(model: nn.Module, path: str, name: str, settings: dict, calls, **options):
    return fitted(model, {"it": (path, name, settings)}, calls, **options)["it"]


def recorded(model: nn.Module, path: str, calls: list[ModelCall]) -> list[tuple[tuple, dict, Tensor]]:
    """What a module was given and returned in every call."""
    seen = []
    hook = lambda module, args, kwargs, output: seen.append((args, kwargs, output))  # noqa: E731
    handle = model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        for call in calls:
            call.play(model)
    handle.remove()
    return seen


def lstsq(inputs: list[Tensor], outputs: list[Tensor], calls: list[ModelCall]) -> tuple[Tensor, Tensor]:
    """Weighted least squares with a constant feature, rows as (positions, features), in float64."""
    root = [torch.full((len(rows), 1), call.weight, dtype=torch.float64).sqrt() for rows, call in zip(inputs, calls)]
    root = torch.cat(root)
    design = torch.cat(inputs).double()
    design = torch.cat([design, torch.ones(len(design), 1, dtype=torch.float64)], dim=1)
    # Tokens of 16 numbers embedded in 24 are of rank 16: what is left of the others is rounding, not a feature.
    solution = torch.linalg.lstsq(
        design * root, torch.cat(outputs).double() * root, rcond=1e-5, driver="gelsd"
    ).solution.T
    return solution[:, :-1].float(), solution[:, -1].float()


def pixels(map: Tensor) -> Tensor:
    return map.permute(0, 2, 3, 1).reshape(-1, map.shape[1])
