"""The benchmark of layer scoring at tiny sizes: what it counts, times and compares."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from families.family_cases import dense_run

import genprune as gp
from genprune.layers.swapping import removal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts import bench_layer_scoring  # noqa: E402
from scripts.layer_scoring import hosts, measure  # noqa: E402


@pytest.fixture
def tiny(monkeypatch):
    """The benchmark's U-Net at the size of the family case."""
    monkeypatch.setitem(
        hosts.HOSTS,
        "unet",
        hosts.Host(dense_run("unet").case.build, ("block", "wrapper"), {}, {"height": 8, "width": 8}, 2),
    )
    return measure.measure("unet", quick=True, rounds=2)


def test_both_ways_are_timed_and_give_the_same_scores(tiny):
    sites = gp.find_sites(dense_run("unet").model).of_kind("block", "wrapper")
    assert tiny["layers"] == len(range(0, len(sites), 2)) and len(tiny["rounds"]) == 2
    assert tiny["score_relative_error"] <= 1e-6
    assert 0 < tiny["counted_ratio"] == tiny["limit_macs"] / tiny["naive_macs"] < 1
    for done in tiny["rounds"]:
        for clock in ("wall", "cpu"):
            assert 0 < done[clock]["naive"] and 0 < done[clock]["reuse"]
    assert 0 < tiny["measured_behind_ratio"] < 1
    assert tiny["cost_over_limit"] == pytest.approx(tiny["time_ratio"] / tiny["counted_ratio"])


def test_the_named_figures(tiny):
    found = bench_layer_scoring.figures({"unet": tiny, "dit": tiny | {"score_relative_error": 1.0}})
    assert found["scoring_cost_over_limit_unet"] == tiny["cost_over_limit"]
    assert found["scoring_time_ratio_dit"] == tiny["time_ratio"]
    assert found["score_relative_error"] == 1.0


@pytest.mark.parametrize("name", bench_layer_scoring.PARTS)
def test_every_host_has_layers_to_score_at_its_full_size(name):
    model, spec = hosts.meta_host(name), hosts.HOSTS[name]
    sites = gp.find_sites(model).of_kind(*spec.kinds)
    assert len(sites) >= 24 and all(removal(model, site) for site in sites.values())
    assert next(model.parameters()).device == torch.device("meta")
