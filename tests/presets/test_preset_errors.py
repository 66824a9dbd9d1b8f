"""A preset on the wrong model or with the wrong options says what was expected, and what to pass instead."""

from __future__ import annotations

import copy

import pytest
from preset_hosts import SD, dense
from tiny_hosts import ddpm_unet, dit, sd3, sd_unet

import genprune as gp
from genprune.presets import preset_plan


@pytest.mark.parametrize(
    ("build", "name", "message"),
    [
        (lambda: dense("sd"), "koala-1b", r"of down \[1 1\].*expected a dense SDXL U-Net.*presets: bk-sdm-base, "),
        (lambda: dense("sdxl"), "bk-sdm-tiny", r"expected a dense Stable Diffusion 1.x / 2.x U-Net.*koala-1b"),
        (sd_unet, "bk-sdm-base", r"no shape of this UNet2DConditionModel of down \[1\] \[0\].*gp\.preset_cards\(\)"),
        (ddpm_unet, "bk-sdm-base", r"no shape of this UNet2DModel; expected a dense Stable Diffusion"),
        (dit, "vega", r"no shape of this DiTTransformer2DModel.*Its own presets: alternate-layers"),
        (lambda: sd_unet(**SD | {"layers_per_block": 1}), "bk-sdm-small", r"expected a dense.*down \[1 1\] \[1 1\]"),
        (sd_unet, "alternate-layers", r"model is a UNet2DConditionModel; expected one of DiT.*'bk-sdm-base'"),
    ],
)
def test_another_host(build, name, message):
    with pytest.raises(gp.UnsupportedModel, match=message):
        preset_plan(build(), name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bk-sdm-bas", {}, "no preset 'bk-sdm-bas', nearest name: 'bk-sdm-base'; expected one of bk-sdm-base, "),
        ("bk-sdm-base", {"keep": 0.5}, "keep=0.5 with 'bk-sdm-base', whose size is fixed.*gp.make_plan"),
        ("bk-sdm-base", {"which": "evn"}, "which='evn', nearest name: 'even'; expected one of first, even"),
        ("alternate-layers", {"keep": 1.0}, "keep=1.0; expected a share of the blocks between 0 and 1"),
        ("alternate-layers", {"keep": True}, "keep=True; expected a share"),
        ("alternate-layers", {"which": "even"}, "which='even' with 'alternate-layers'.*Leave it"),
        ("alternate-layers", {"keep": 0.34}, "leaves 1 of 3 blocks.*of which 2 always stay.*0.667 or more"),
        ("alternate-layers", {"keep": 0.99}, "no block of this SD3.* goes under keep=0.99.*3 blocks. Pass a smaller"),
    ],
)
def test_options(name, options, message):
    with pytest.raises(gp.GenpruneError, match=message):
        preset_plan(sd3() if name == "alternate-layers" else dense("sd"), name, **options)


def test_a_cut_model_has_no_preset():
    model = copy.deepcopy(dense("sd"))
    plan = preset_plan(model, "bk-sdm-base")
    gp.cut(model, plan)
    with pytest.raises(gp.PlanMismatch, match="was cut before; expected a dense model.*Load the base again"):
        preset_plan(model, "bk-sdm-small")


def test_what_a_plan_says():
    plan = preset_plan(dense("sd"), "bk-sdm-base")
    assert plan.made_by == {"preset": "bk-sdm-base", "settings": {"which": "first"}}
    assert "params" in str(plan) and "%" in str(plan)
