"""Handles of denoisers beyond one call: presets, measured time, handles found again, `set` after `remove`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from token_denoisers import denoiser, inputs_of, run

import genprune as gp
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
