"""Handles of denoisers beyond one call: presets, measured time, handles found again, `set` after `remove`."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from token_denoisers import denoiser, inputs_of, run
from token_hosts import images, vit

import genprune as gp
from genprune.tokens.handle import handle_of
from genprune.tokens.latency import Timing

SMALL = {"height": 16, "width": 16}


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_a_preset_has_the_counts_and_gives_the_same_output(family, tmp_path):
    model = denoiser(family)
    inputs = inputs_of(model, family)
    with gp.prune_tokens(model, gp.DiffusionTokens(gp.ZeroTPrune(), tokens=0.5)) as handle:
        wanted, counts = run(model, inputs), handle.counts
        handle.preset().save(tmp_path / "preset.json")
    with gp.prune_tokens(model, tmp_path / "preset.json") as handle:
        assert handle.counts == counts
        assert torch.equal(run(model, inputs), wanted)


def calls_seen(seen: list):
    """Stands in for the clock: every timed model is called twice."""

    def compare(calls, dense, **settings):
        for call in calls.values():
            if call.state is not None:
                steps = next(h.__self__ for h in call.model._forward_pre_hooks.values()).steps
                for _ in range(2):
                    call()
                    seen.append((steps.settings, call.schedule, steps.reuse, steps.factor))
        one = SimpleNamespace(estimate=1.0, low=1.0, high=1.0)
        return SimpleNamespace(ratio=dict.fromkeys(calls, one), device="none")

    return compare


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_time_is_measured_of_steps_that_score_with_the_handles_own_settings(family):
    model, seen = denoiser(family), []
    settings = gp.DiffusionTokens(
        gp.ZeroTPrune(), tokens=0.5, restore="own", every=3, early=((0.5, 0.1),), operating_point=SMALL
    )
    with gp.prune_tokens(model, settings, timing=Timing(compare=calls_seen(seen))) as handle:
        handle.measure()
        for used, schedule, reused, factor in seen:
            assert used.restore == "own" and not reused and factor == 1.0
            assert schedule == handle._state.schedule
    assert len(seen) == 2


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_the_handle_of_a_copy_has_its_settings_and_switches_it_alone(family):
    model = denoiser(family)
    inputs = inputs_of(model, family)
    settings = gp.DiffusionTokens(gp.ZeroTPrune(), tokens=0.5, every=2, operating_point=SMALL)
    with gp.prune_tokens(model, settings) as handle:
        wanted = run(model, inputs)
        twin = copy.deepcopy(model)
        found = handle_of(twin)
        assert type(found) is type(handle) and found.settings == handle.settings
        assert found.report() == handle.report()
        found.set(tokens=1.0)
        assert not torch.equal(run(twin, inputs), wanted)
        assert torch.equal(run(model, inputs), wanted)


def test_set_after_remove_is_an_error_and_not_silence():
    model = vit()
    handle = gp.prune_tokens(model, gp.ZeroTPrune(keep=0.8))
    handle.remove()
    with pytest.raises(gp.GenpruneError, match="hooks of this handle are off.*gp.prune_tokens"):
        handle.set(keep=0.7)
    unet = denoiser("sd")
    handle = gp.prune_tokens(unet, gp.DiffusionTokens(gp.ZeroTPrune(), tokens=0.5))
    handle.remove()
    with pytest.raises(gp.GenpruneError, match="hooks of this handle are off"):
        handle.set(tokens=0.7)


def test_an_old_handle_takes_nothing_from_a_later_reduction():
    model = vit(class_token=False, global_pool="avg")
    old = gp.prune_tokens(model, gp.ZeroTPrune(keep=0.8))
    handle_of(model).remove()
    gp.prune_tokens(model, gp.ZeroTPrune(keep=0.8))
    wanted = model(images())
    old.remove()
    assert torch.equal(model(images()), wanted)


def test_saved_settings_are_taken_by_their_path(tmp_path):
    model, settings = denoiser("sd"), gp.DiffusionTokens(gp.ZeroTPrune(), tokens=0.5, every=2)
    settings.save(tmp_path / "settings.json")
    with gp.prune_tokens(model, tmp_path / "settings.json") as handle:
        assert handle.settings == settings
    with pytest.raises(gp.UnsupportedModel, match="no denoiser"):
        gp.prune_tokens(vit(), tmp_path / "settings.json")
