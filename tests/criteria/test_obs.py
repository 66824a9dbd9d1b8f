"""OBS scores against brute force: the rise of the error after the best refit of what stays."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_hosts import HOSTS, flux, sd_unet, vit
from tiny_pipelines import sd_pipeline
from torch import nn

import genprune as gp
from genprune.criteria.obs import OBSScores, damped_inverse, fused_by_rank
from genprune.denoising.activations import Moments
from genprune.errors import BadCalibrationData, GenpruneError, NoMatchingSites
from genprune.families import family_of
from genprune.methods import method_from_json

TINY = 1e-9  # damping that the comparison with undamped least squares does not see


def layer_and_inputs(rows=200, features=6, seed=0):
    torch.manual_seed(seed)
    mix = torch.randn(features, features, dtype=torch.float64)
    inputs = torch.randn(rows, features, dtype=torch.float64) @ mix + torch.randn(features, dtype=torch.float64)
    layer = nn.Linear(features, 4).double()
    moments = Moments.zeros(features, "cpu")
    moments.add(inputs)
    return layer, inputs, moments


def refit_error(layer, inputs, gone, with_bias):
    """Mean squared error of the best fit of the layer's output on the other features, by lstsq."""
    kept = [i for i in range(inputs.shape[1]) if i not in gone]
    design = inputs[:, kept]
    if with_bias:
        design = torch.cat([design, torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)
    target = (inputs @ layer.weight.T).detach()
    solution = torch.linalg.lstsq(design, target).solution
    return float((target - design @ solution).square().sum(1).mean())


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize(("start", "units", "width"), [(0, 6, 1), (0, 3, 2), (2, 2, 2)])
def test_group_scores_are_the_error_after_the_best_refit(start, units, width, centre):
    layer, inputs, moments = layer_and_inputs()
    errors = OBSScores(damping=TINY, relative=False, centre=centre)._errors(layer, moments)
    for unit, found in enumerate(errors(start, units, width)):
        gone = range(start + unit * width, start + (unit + 1) * width)
        assert float(found) == pytest.approx(refit_error(layer, inputs, gone, centre), rel=1e-5)


def test_the_forms_agree_for_single_columns_and_differ_for_groups():
    layer, _, moments = layer_and_inputs()
    group = OBSScores(damping=TINY, centre=False)._errors(layer, moments)
    columns = OBSScores(damping=TINY, form="columns", centre=False)._errors(layer, moments)
    torch.testing.assert_close(group(0, 6, 1), columns(0, 6, 1))
    inverse = damped_inverse(2 * moments.second, TINY)
    published = (layer.weight.detach().square().sum(0) / inverse.diagonal() / 2).reshape(3, 2).sum(1)
    torch.testing.assert_close(columns(0, 3, 2), published)
    assert not torch.allclose(columns(0, 3, 2), group(0, 3, 2))


def test_relative_scores_do_not_see_the_layers_scale():
    layer, _, moments = layer_and_inputs()
    relative = OBSScores(relative=True)
    before = relative._errors(layer, moments)(0, 6, 1)
    with torch.no_grad():
        layer.weight.mul_(10)
    torch.testing.assert_close(relative._errors(layer, moments)(0, 6, 1), before)


def test_dead_inputs_score_zero():
    layer, inputs, _ = layer_and_inputs()
    moments = Moments.zeros(6, "cpu")
    moments.add(torch.zeros_like(inputs))
    assert torch.isfinite(OBSScores()._errors(layer, moments)(0, 6, 1)).all()


def test_reciprocal_rank_fusion():
    image, text = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([0.1, 0.4, 0.3, 0.2])
    fused = fused_by_rank([image, text])
    ranks = [(1, 4), (2, 1), (3, 2), (4, 3)]
    naive = [sum(1 / (60 + rank) for rank in pair) for pair in ranks]
    assert fused.argsort(descending=True).tolist() == sorted(range(4), key=lambda i: -naive[i])
    torch.testing.assert_close(fused.sort().values, (image + text).sort().values)


def data_for(model, rows=2):
    family = family_of(model)
    size = {} if family.library == "timm" else {"height": 8, "width": 8}
    text = {"text_length": 5} if family.library == "diffusers" and family.name != "unet" else {}
    point = family.operating_point(model, batch=rows, **size, **text)
    torch.manual_seed(0)
    return [family.example_inputs(model, point, "cpu", next(model.parameters()).dtype)]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_every_host_has_an_obs_plan(host, allocation):
    model = HOSTS[host]().eval()
    plan = gp.make_plan(model, gp.OBS(keep=0.9, allocation=allocation), data=data_for(model), progress=False)
    assert {name.rsplit(":")[-1] for name in plan.keep} <= {"heads", "neurons", "channels"}
    counted = gp.count_costs(gp.cut(model, plan), **plan.operating_point)
    assert counted.params == plan.figures["params"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_units_that_nobody_reads_go_first():
    model = vit().eval()
    idle = torch.arange(96) % 3 == 1
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[:, idle] = 0
    scores = gp.score(model, gp.OBS(), data=data_for(model), progress=False)
    assert torch.equal(scores.values["blocks.1.mlp:neurons"] == 0, idle)


def test_joint_attention_sums_two_streams_or_fuses_ranks():
    model = flux().eval()
    name = "transformer_blocks.0.attn:heads"
    found = {
        fuse: gp.score(model, gp.OBS(fuse=fuse), data=data_for(model), progress=False).values[name]
        for fuse in ("sum", "rank")
    }
    torch.testing.assert_close(found["sum"].sort().values, found["rank"].sort().values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    full, half = vit().eval(), vit().to(dtype).eval()
    name = "blocks.1.mlp:neurons"
    values = [gp.score(m, gp.OBS(), data=data_for(m), progress=False).values[name] for m in (full, half)]
    assert torch.corrcoef(torch.stack(values))[0, 1] > 0.9  # 8 bits of each weight and activation


def test_packages_do_not_change_scores(tmp_path):
    pipe = sd_pipeline(tmp_path)
    options = {"prompts": ["a cat", "two dogs"], "operating_point": {"height": 8, "width": 8}, "progress": False}
    whole, apart = (gp.score(pipe, gp.OBS(steps=2, modules_per_pass=count), **options).values for count in (None, 3))
    assert all(torch.equal(whole[name], apart[name]) for name in whole)
    again = gp.score(pipe, gp.OBS(steps=2), seed=1, **options).values
    assert not all(torch.equal(whole[name], again[name]) for name in whole)


def test_bad_settings_and_kinds_are_refused():
    with pytest.raises(NoMatchingSites, match="OBS has no score for sites of kind 'block'; expected some of heads"):
        gp.OBS(kinds=("heads", "block"))
    with pytest.raises(GenpruneError, match="form='groups', nearest name: 'group'; expected one of group, columns"):
        gp.OBS(form="groups")
    with pytest.raises(GenpruneError, match="damping=0; expected a number above 0"):
        gp.OBS(damping=0)
    with pytest.raises(GenpruneError, match=r"step_weights=\(1.0,\); expected two numbers above 0"):
        gp.OBS(step_weights=(1.0,))
    with pytest.raises(GenpruneError, match="modules_per_pass=0; expected a whole number of at least 1"):
        gp.OBS(modules_per_pass=0)
    model = sd_unet().eval()
    with pytest.raises(GenpruneError, match="has no layer that reads its units, so that OBS has no score for it"):
        OBSScores().scores(model, gp.find_sites(model), [object()])
    with pytest.raises(BadCalibrationData, match="no calibration call"):
        OBSScores().scores(model, gp.find_sites(model), [])


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(value, centre):
    model = vit()
    batch = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch[0, 0, 0, 0] = value
    with pytest.raises(GenpruneError, match="what 'blocks.0.* is given is not finite; expected finite activations"):
        gp.score(model, gp.OBS(centre=centre), data=[batch], progress=False)


def test_settings_travel_as_json():
    method = gp.OBS(form="columns", fuse="rank", step_weights=(1.0, 1.0), steps=25, allocation="uniform")
    assert method_from_json(json.dumps(method.to_json())) == method
