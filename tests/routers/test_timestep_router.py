"""Experts by noise level, behind the face of a prompt router."""

from __future__ import annotations

import dataclasses
import json
import logging
import math

import pytest
import tiny_pipelines
from router_cases import expert_plans

import genprune as gp
from genprune.cutting import plan_base
from genprune.routers import Expert, PromptRouter, RouteStatistics, TimestepRouter, load_router
from genprune.routers.fingerprints import weights_fingerprint

BOUNDARIES = (0.25, 0.7)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny_pipelines.sd_pipeline(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def router(pipe):
    experts = [Expert(plan, usage) for plan, usage in zip(expert_plans(pipe, 3), (0.25, 0.45, 0.3))]
    base, weights = plan_base(pipe.unet), weights_fingerprint(pipe.unet)
    training = {"settings": {"keep": 0.75, "of": "macs"}}
    return TimestepRouter(experts, BOUNDARIES, base=base, training=training, weights_fingerprint=weights)


@pytest.mark.parametrize(
    ("noise", "expert"), [(0, 0), (0.2499, 0), (0.25, 1), (0.5, 1), (0.7, 2), (math.nextafter(0.7, 0), 1), (1, 2)]
)
def test_a_noise_level_has_one_expert(router, noise, expert):
    assert router.expert_at(noise) == expert


@pytest.mark.parametrize("noise", [-0.01, 1.01, math.nan, 999])
def test_what_is_no_noise_level_is_refused(router, noise):
    with pytest.raises(gp.GenpruneError, match=r"expected one in \[0, 1\]. Pass timestep / num_train_timesteps"):
        router.expert_at(noise)


@pytest.mark.parametrize("boundaries", [(), (0.5,), (0.7, 0.2), (0.5, 0.5), (0.0, 0.5), (0.5, 1.0), (math.nan, 0.5)])
def test_boundaries_ascend_between_the_ends(router, boundaries):
    with pytest.raises(gp.GenpruneError, match=r"for 3 experts; expected 2 ascending numbers in \(0, 1\)"):
        TimestepRouter(router.experts, boundaries, base=router.base)
    with pytest.raises(gp.GenpruneError, match="expected numbers in"):
        TimestepRouter(router.experts, ("low", "high"), base=router.base)


def test_one_expert_has_no_boundaries(router, caplog):
    with caplog.at_level(logging.WARNING, "genprune"):
        one = TimestepRouter(router.experts[:1], (), base=router.base)
    assert one.expert_at(0.0) == one.expert_at(1.0) == 0 and not caplog.records


def test_the_face_is_that_of_a_prompt_router(router, pipe):
    assert (router.kind, PromptRouter.kind) == ("timestep", "prompt")
    assert router.plans == tuple(expert.plan for expert in router.experts)
    assert router.target == 0.75
    assert router.trained_share == pytest.approx(sum(u * s for u, s in zip(router.usage, router.shares)))
    router.check_base(pipe.unet)
    report = router.report()
    assert "TimestepRouter of 3 experts" in report and "0: 0-0.25, 1: 0.25-0.7, 2: 0.7-1" in report
    assert router.summary()["boundaries"] == list(BOUNDARIES)
    statistics = RouteStatistics.of(router)
    statistics.update([router.expert_at(step / 20) for step in range(20)])
    assert statistics.counts == [5, 9, 6]


def test_a_folder_comes_back_as_it_was(router, tmp_path):
    tuned = tmp_path / "tuned.safetensors"
    from safetensors.torch import save_file

    save_file({}, tuned)
    router = router.with_experts([dataclasses.replace(router.experts[0], weights=tuned), *router.experts[1:]])
    folder = router.save_pretrained(tmp_path / "router")
    assert json.loads((folder / "router_config.json").read_text())["kind"] == "timestep"
    assert not (folder / "router.safetensors").exists()
    for again in (load_router(folder), TimestepRouter.from_pretrained(folder)):
        assert isinstance(again, TimestepRouter)
        assert (again.boundaries, again.plans, again.usage) == (BOUNDARIES, router.plans, router.usage)
        assert (again.base, again.training) == (router.base, router.training)
        assert again.weights_fingerprint == router.weights_fingerprint
        assert again.experts[0].weights == folder / "experts/00/weights.safetensors"
        assert again.experts[1].weights is None
    with pytest.raises(gp.PlanMismatch, match="holds a router of kind 'timestep'; expected 'prompt'"):
        PromptRouter.from_pretrained(folder)


def test_edited_boundaries_are_refused(router, tmp_path):
    folder = router.save_pretrained(tmp_path / "router")
    config = json.loads((folder / "router_config.json").read_text())
    (folder / "router_config.json").write_text(json.dumps(config | {"boundaries": [0.7, 0.2]}))
    with pytest.raises(gp.PlanMismatch, match="boundaries are .*Restore the folder"):
        load_router(folder)
    (folder / "router_config.json").write_text(json.dumps(config | {"encoder": None}))
    with pytest.raises(gp.PlanMismatch, match="unknown key 'encoder'"):
        load_router(folder)
