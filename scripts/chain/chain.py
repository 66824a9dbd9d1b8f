"""Find, plan, cut, save and reload of a full-size host with random weights: seconds and peak memory of each."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

import genprune as gp
from scripts.chain.hosts import random_host
from scripts.chain.phases import measured


def run_chain(host: str, keep: float = 0.7) -> dict[str, Any]:
    """Every phase of `host` in bf16, planned by magnitude for `keep` of its MACs.

    Returns:
        Per phase `seconds`, `before_bytes`, `peak_bytes`, `extra_bytes`; the model's bytes before and after; and
        whether the reloaded model has the cut model's weights, bit by bit.
    """
    phases: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "small"
        told = _until_saved(host, keep, place, phases)
        cls, sample = told.pop("class"), told.pop("sample")
        again, phases["reload"] = measured(lambda: cls.from_pretrained(place, torch_dtype=torch.bfloat16))
    state = again.state_dict()
    return {
        "host": host,
        "dtype": "bfloat16",
        **told,
        "phases": phases,
        "reload_is_exact": all(torch.equal(state[name], value) for name, value in sample.items()),
        # A reload holds the loaded model itself: what it needs beyond that is extra.
        "extra_memory_ratio": {
            name: max(0, phase["extra_bytes"] - (told["cut_bytes"] if name == "reload" else 0)) / told["dense_bytes"]
            for name, phase in phases.items()
        },
    }


def _until_saved(host: str, keep: float, place: Path, phases: dict[str, dict]) -> dict[str, Any]:
    """Every phase but the reload; the model is gone from memory when this returns."""
    # Uniform: every site shrinks, which is the most work for a cut. Global plans leave many layers alone.
    method = gp.Magnitude(keep=keep, of="macs", allocation="uniform")
    _warm_up(method, place.with_name("warm-up"))
    model = random_host(host, torch.bfloat16)
    dense_bytes = _weight_bytes(model)
    sites, phases["find"] = measured(lambda: gp.find_sites(model))
    plan, phases["plan"] = measured(lambda: gp.make_plan(model, method, progress=False))
    _, phases["cut"] = measured(lambda: gp.cut(model, plan))
    _, phases["save"] = measured(lambda: model.save_pretrained(place))
    return {
        "class": type(model),
        "sample": {name: value.clone() for name, value in list(model.state_dict().items())[::25]},
        "sites": len(sites),
        "dense_bytes": dense_bytes,
        "cut_bytes": _weight_bytes(model),
        "figures": dict(plan.figures),
        "operating_point": dict(plan.operating_point),
    }


def _warm_up(method, place: Path) -> None:
    """The same on a tiny U-Net, so that importing libraries counts for no phase."""
    from diffusers import UNet2DConditionModel

    tiny = UNet2DConditionModel(sample_size=8, block_out_channels=(32, 64, 64, 64), cross_attention_dim=32)
    gp.cut(tiny, gp.make_plan(tiny, method, progress=False)).save_pretrained(place)
    type(tiny).from_pretrained(place, torch_dtype=torch.bfloat16)


def _weight_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
