"""Taylor: gate gradients against finite differences, timestep weights, flat and clean."""

from __future__ import annotations

import pytest
import torch
from tiny_hosts import sd_unet, vit

import genprune as gp
from genprune.criteria import checked_scores, criteria, criterion_named
from genprune.criteria.taylor import TaylorScores, gate_gradients
from genprune.denoising import DenoisingBatch, ImageBatch
from genprune.errors import BadCalibrationData, GenpruneError
from genprune.families import OperatingPoint, family_of
from genprune.gates import attach_gates
from genprune.planning import untouched


def batch_for(model, rows=2, timestep=500.0, seed=0):
    torch.manual_seed(seed)
    dtype = next(model.parameters()).dtype
    inputs = family_of(model).example_inputs(model, OperatingPoint(8, 8, 5, rows), "cpu", dtype)
    inputs["timestep"] = torch.full((rows,), int(timestep))
    return DenoisingBatch(inputs, torch.randn_like(inputs["sample"]), timestep)


def test_gradients_equal_finite_differences():
    model = sd_unet().double().eval()
    sites = gp.find_sites(model)
    batch = batch_for(model)
    with untouched(model):
        gradients, loss = gate_gradients(model, sites, batch)
    assert loss == pytest.approx(float(batch.losses(model).sum().detach()), rel=1e-6)
    step = 2.0**-10  # exact in the gate's float32; the error is its square times the third derivative
    for kind in sites.kinds():
        site = list(sites.of_kind(kind).values())[-1]
        unit = site.size // 2
        for row in range(batch.rows):
            sides = []
            for sign in (1, -1):
                gate = torch.ones(batch.rows, site.size)
                gate[row, unit] += sign * step
                with torch.no_grad(), attach_gates(model, {site.name: gate}, sites):
                    sides.append(float(batch.losses(model).sum()))
            difference = (sides[0] - sides[1]) / (2 * step)
            assert float(gradients[site.name][row, unit]) == pytest.approx(difference, rel=1e-4, abs=1e-9)


def test_scores_are_weighted_means_over_timesteps_of_row_means():
    model = sd_unet().eval()
    sites = gp.find_sites(model).of_kind("heads", "block")
    batches = [batch_for(model, rows, t, seed) for rows, t, seed in ((2, 100.0, 0), (1, 100.0, 1), (2, 900.0, 2))]
    with untouched(model):
        found = [gate_gradients(model, sites, batch)[0] for batch in batches]
        scores = TaylorScores(weights=(3.0, 1.0)).scores(model, sites, iter(batches))
    for name in sites:
        early = torch.cat([found[0][name], found[1][name]]).abs().mean(0)
        late = found[2][name].abs().mean(0)
        torch.testing.assert_close(scores[name], 0.75 * early + 0.25 * late)
    with untouched(model), pytest.raises(BadCalibrationData, match="3 weights for 2 timesteps; expected one for each"):
        TaylorScores(weights=(1.0, 1.0, 1.0)).scores(model, sites, iter(batches))


def test_threshold_drops_timesteps_that_carry_little_loss():
    model = sd_unet().eval()
    sites = gp.find_sites(model).of_kind("heads")
    large, small = batch_for(model, timestep=100.0), batch_for(model, timestep=900.0)
    with torch.no_grad():
        answer = model(**small.inputs, return_dict=False)[0]
    small = DenoisingBatch(small.inputs, answer + 0.01, 900.0)  # a loss of 1e-4
    with untouched(model):
        both = TaylorScores(threshold=0.05).scores(model, sites, [large, small])
        alone = TaylorScores().scores(model, sites, [large])
    assert all(torch.equal(both[name], alone[name]) for name in sites)


def test_images_and_labels():
    model = vit().eval()
    sites = gp.find_sites(model)
    torch.manual_seed(0)
    batches = [ImageBatch(torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 4])) for _ in range(2)]
    with untouched(model):
        scores = checked_scores(TaylorScores().scores(model, sites, batches), sites, "taylor")
    assert all((values >= 0).all() for values in scores.values())
    assert all(float(values.sum()) > 0 for name, values in scores.items() if sites[name].kind in ("heads", "neurons"))


def test_nothing_but_gates_gets_gradients():
    model = sd_unet().eval()
    sites = gp.find_sites(model)
    with untouched(model):
        TaylorScores().scores(model, sites, [batch_for(model)])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_works_without_gradient_mode():
    model = sd_unet().eval()
    sites = gp.find_sites(model).of_kind("heads")
    batch = batch_for(model)
    with untouched(model):
        expected = gate_gradients(model, sites, batch)[0]
        with torch.no_grad():
            found = gate_gradients(model, sites, batch)[0]
    assert all(torch.equal(found[name], expected[name]) for name in sites)


def test_scores_that_are_not_finite_are_refused():
    model = sd_unet()
    with torch.no_grad():
        model.conv_in.weight.fill_(float("nan"))
    with pytest.raises(GenpruneError, match=r"'taylor' gave 4 of 4 units of '.*attn1:heads' a score that is NaN"):
        gp.score(model, gp.Taylor(kinds=("heads",)), data=[(batch_for(model).inputs, torch.zeros(2, 4, 8, 8))])


def test_every_criterion_says_what_it_needs():
    assert {"random", "magnitude", "taylor", "obs"} <= set(criteria())
    for name in criteria():
        criterion = criterion_named(name)
        assert criterion.name == name and criterion.summary and isinstance(criterion.additive, bool)
        assert set(criterion.needs) <= {"weights", "gradients", "activations"}
    with pytest.raises(GenpruneError, match="no criterion 'tailor', nearest name: 'taylor'; expected one of random"):
        criterion_named("tailor")
