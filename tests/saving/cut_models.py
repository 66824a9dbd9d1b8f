"""Tiny models cut at random on every kind of site, for the tests of saving, loading and LoRAs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_hosts import HOSTS
from torch import Tensor, nn

import genprune as gp
from genprune.cutting import plan_base
from genprune.families import family_of

DIFFUSERS_HOSTS = tuple(name for name in HOSTS if name != "vit")


def dense(name: str) -> nn.Module:
    """A tiny dense model whose every weight, norm and bias is random."""
    model = HOSTS[name]().eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model


def plan_for(model: nn.Module, seed: int = 0, depth: bool = True) -> gp.PruningPlan:
    """Random units of every site; with `depth`, some whole branches and blocks as well."""
    source, keep = torch.Generator().manual_seed(seed), {}
    for name, site in gp.find_sites(model).items():
        if site.size > 1:
            keep[name] = torch.rand(site.size, generator=source) < 0.6
            keep[name][-1] = True  # never the first units only
            keep[name][0] = False
        elif depth and torch.rand(1, generator=source) < 0.15:
            keep[name] = torch.zeros(1, dtype=torch.bool)
    return gp.PruningPlan(plan_base(model), keep)


def cut_model(name: str, seed: int = 0, depth: bool = True) -> nn.Module:
    model = dense(name)
    return gp.cut(model, plan_for(model, seed, depth))


def without_block(name: str) -> nn.Module:
    """A model that lost one whole block and nothing else."""
    model = dense(name)
    block = next(n for n, site in gp.find_sites(model).items() if site.kind == "block")
    return gp.cut(model, gp.PruningPlan(plan_base(model), {block: torch.zeros(1, dtype=torch.bool)}))


def inputs(model: nn.Module) -> dict[str, Any]:
    family = family_of(model)
    small = {} if family.library == "timm" else {"height": 8, "width": 8, "text_length": 5}
    torch.manual_seed(2)
    return family.example_inputs(model, family.operating_point(model, **small), "cpu", torch.float32)


def run(model: nn.Module, given: dict[str, Any] | None = None) -> Tensor:
    with torch.no_grad():
        output = model(**(given or inputs(model)))
    return output if isinstance(output, Tensor) else output[0]


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest deviation, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def same_state(found: nn.Module, expected: nn.Module) -> None:
    """Same names in the same order, same dtypes, same bits."""
    left, right = found.state_dict(), expected.state_dict()
    assert list(left) == list(right)
    for name, value in right.items():
        assert left[name].dtype == value.dtype, name
        assert torch.equal(left[name], value), name


def no_pickle_in(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}
