"""Compensation on every family: less error, gated == cut, nothing else touched, and as it was where it fails."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from families.family_cases import CASE_NAMES, dense_run, difference, example_inputs, random_keep, run
from tiny_pipelines import flux_pipeline, sd_pipeline

import genprune as gp
from genprune.cutting import plan_base
from genprune.errors import BadCalibrationData, GenpruneError, PlanMismatch
from genprune.plan import PruningPlan
from genprune.recovery.exchange import Exchange

NARROW = ("heads", "neurons", "channels")
MODES = [("bias", False), ("least_squares", False), ("least_squares", True)]
SIZE = {"height": 8, "width": 8}


def narrow_plan(dense, seed=1, kinds=NARROW):
    keep = random_keep(dense.sites, seed)
    return dense.plan({name: mask for name, mask in keep.items() if dense.sites[name].kind in kinds})


def compensate(model, plan, data, **options):
    options = {"damping": 1e-3, "modules_per_pass": 2, "progress": False} | options
    return gp.compensate(model, plan, data=data, **options)


@pytest.mark.parametrize(("method", "sequential"), MODES)
@pytest.mark.parametrize("name", CASE_NAMES)
def test_less_error_on_every_family_and_gated_equals_cut(name, method, sequential):
    dense = dense_run(name)
    plan, model = narrow_plan(dense), dense.copy()
    torch.manual_seed(0)
    done = compensate(model, plan, [dense.inputs], method=method, sequential=sequential)
    assert done.errors or done.skipped
    for path, (before, after) in done.errors.items():
        assert after <= before * (1 + 1e-9), path
    with torch.no_grad():
        with gp.attach_gates(dense.model, plan):
            plain = difference(dense.output, run(dense.model, dense.inputs))
        with gp.attach_gates(model, plan):
            gated = run(model, dense.inputs)
        cut = run(gp.cut(model, plan), dense.inputs)
    assert difference(gated, cut) <= 1e-5  # the invariant
    # Layers are fitted one by one: a bias may help each and not their sum; a refit does.
    assert difference(dense.output, gated) < plain * (1.05 if method == "bias" else 0.8)


@pytest.mark.parametrize("name", ["unet", "flux", "sd3-dual", "vit"])
def test_keeping_everything_and_other_kinds_change_no_bit(name):
    dense = dense_run(name)
    whole = dense.plan({n: torch.ones(site.size, dtype=torch.bool) for n, site in dense.sites.items()})
    kinds = [kind for kind in dense.sites.kinds() if kind not in NARROW]
    for plan in (whole, narrow_plan(dense, seed=2, kinds=kinds)):
        model = dense.copy()
        assert not compensate(model, plan, [dense.inputs]).errors
        for key, value in model.state_dict().items():
            assert torch.equal(value, dense.model.state_dict()[key]), key


def test_only_layers_that_lose_inputs_change():
    dense = dense_run("unet")
    names = [name for name, site in dense.sites.items() if site.kind in ("neurons", "channels")][:2]
    plan = dense.plan({name: torch.arange(dense.sites[name].size) % 2 == 0 for name in names})
    for sequential in (False, True):
        model = dense.copy()
        flags = [(p.requires_grad, id(p)) for p in model.parameters()]
        done = compensate(model, plan, [dense.inputs], sequential=sequential)
        before = dense.model.state_dict()
        changed = {
            key.rpartition(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])
        }
        assert changed == set(done.errors) and len(changed) == 2
        assert [(p.requires_grad, id(p)) for p in model.parameters()] == flags
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_emptied_sites_leave_the_mean_in_the_bias():
    dense = dense_run("vit")
    name = "blocks.0.attn:heads"
    plan = dense.plan({name: torch.zeros(dense.sites[name].size, dtype=torch.bool)})
    model = dense.copy()
    compensate(model, plan, [dense.inputs])
    seen = []
    handle = dense.model.blocks[0].attn.register_forward_hook(lambda m, a, output: seen.append(output))
    with torch.no_grad():
        run(dense.model, dense.inputs)
        handle.remove()
        cut = gp.cut(model, plan)
    torch.testing.assert_close(cut.blocks[0].attn.proj.bias, seen[0].mean((0, 1)), rtol=1e-4, atol=1e-5)


def test_a_neuron_that_others_make_up_for_costs_nothing():
    """Two neurons that compute the same: one can go, and the output is as before."""
    dense = dense_run("vit")
    model = dense.copy()
    first = model.blocks[0].mlp.fc1
    with torch.no_grad():
        first.weight[5], first.bias[5] = first.weight[9], first.bias[9]
        expected = run(model, dense.inputs)
    keep = torch.ones(first.out_features, dtype=torch.bool)
    keep[5] = False
    plan = PruningPlan(plan_base(model), {"blocks.0.mlp:neurons": keep})
    with torch.no_grad():
        assert difference(expected, run(gp.cut(copy.deepcopy(model), plan), dense.inputs)) > 1e-4
        torch.manual_seed(0)
        many = [example_inputs(dense.model, dense.case, batch=8)]
        many[0]["x"] = torch.randn_like(many[0]["x"])
        compensate(model, plan, [dense.inputs, *many], damping=1e-8)
        assert difference(expected, run(gp.cut(model, plan), dense.inputs)) < 1e-5


def test_one_sequential_package_is_the_fit_on_dense_activations():
    """Nothing before it has changed, so that both measure the same; joint attention and packed inputs included."""
    for name in ("unet", "flux", "sd3-dual"):
        dense = dense_run(name)
        plan, models = narrow_plan(dense), []
        for sequential in (False, True):
            models.append(dense.copy())
            compensate(models[-1], plan, [dense.inputs], sequential=sequential, modules_per_pass=1000, damping=0.1)
        for (key, value), other in zip(models[0].state_dict().items(), models[1].state_dict().values()):
            # Sums in float32, of products and of differences.
            torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


def test_sequential_fits_what_the_cut_model_is_given():
    """In order, later layers make up for earlier ones: the final error is lower than with layers fitted apart."""
    dense = dense_run("unet")
    plan, errors = narrow_plan(dense), []
    for sequential in (False, True):
        model = dense.copy()
        compensate(model, plan, [dense.inputs], sequential=sequential, modules_per_pass=1)
        with torch.no_grad():
            errors.append(difference(dense.output, run(gp.cut(model, plan), dense.inputs)))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sequential", [False, True])
def test_half_precision_weights(dtype, sequential):
    dense = dense_run("vit")
    model, plan = dense.copy().to(dtype), narrow_plan(dense)
    inputs = {"x": dense.inputs["x"].to(dtype)}
    with torch.no_grad():
        plain = difference(dense.output, run(gp.cut(copy.deepcopy(model), plan), inputs).float())
        compensate(model, plan, [inputs], sequential=sequential)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert difference(dense.output, run(gp.cut(model, plan), inputs).float()) < 0.8 * plain


def test_layers_without_a_bias():
    dense = dense_run("vit-distilled-split-glu")  # attn.proj has none
    plan = narrow_plan(dense)
    model = dense.copy()
    done = compensate(model, plan, [dense.inputs], method="bias")
    assert {"blocks.0.attn.proj", "blocks.1.attn.proj"} <= set(done.skipped) and "no bias to move" in str(done)
    model = dense.copy()
    done = compensate(model, plan, [dense.inputs])
    assert not done.skipped and model.blocks[0].attn.proj.bias is None


def test_pipelines_and_their_prompts(tmp_path):
    for pipe in (sd_pipeline(tmp_path), flux_pipeline(tmp_path)):
        model = getattr(pipe, "unet", None) or pipe.transformer
        plan = gp.make_plan(pipe, gp.Magnitude(keep=0.85))
        options = {"steps": 2, "operating_point": SIZE, "progress": False}
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(BadCalibrationData, match="needs calibration prompts, got none"):
            gp.compensate(pipe, plan, **options)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        done = gp.compensate(pipe, plan, ["a cat", "two dogs"], **options)
        assert done.errors and "% left" in str(done)
        gp.cut(pipe, plan)


def test_the_plan_of_a_model_that_was_cut_before():
    dense = dense_run("vit")
    model = gp.cut(dense.copy(), narrow_plan(dense))
    again = gp.make_plan(model, gp.Magnitude(keep=0.4))
    assert compensate(model, again, [dense.inputs]).errors
    gp.cut(model, again)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_failed_run_leaves_the_model_as_it_was(sequential):
    dense = dense_run("unet")
    model, calls = dense.copy(), []

    def failing(model, batch):
        calls.append(None)
        if len(calls) == (6 if sequential else 3):
            raise KeyboardInterrupt
        run(model, batch)

    with pytest.raises(KeyboardInterrupt):
        compensate(model, narrow_plan(dense), [dense.inputs], sequential=sequential, loss_fn=failing)
    assert all(torch.equal(value, dense.model.state_dict()[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_interrupt_between_dense_and_new_weights_is_undone_whole(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    before = copy.deepcopy(model.state_dict())
    exchange = Exchange(model)
    for path in ("0", "1"):
        exchange.put(path, torch.zeros(2, 2), torch.zeros(2))
    whole = exchange._show

    def interrupted(values):
        first = next(iter(values))
        whole({first: values[first]})
        raise KeyboardInterrupt

    monkeypatch.setattr(exchange, "_show", interrupted)
    with pytest.raises(KeyboardInterrupt), exchange.dense():
        pass
    monkeypatch.undo()
    exchange.restore()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_too_little_data_warns_once(caplog):
    dense = dense_run("vit")
    one = {"x": dense.inputs["x"][:1]}
    with caplog.at_level(logging.WARNING):
        compensate(dense.copy(), narrow_plan(dense), [one])
    assert len(caplog.records) == 1
    assert "layers were refitted on fewer positions than features" in caplog.text


def test_bad_calls_are_refused():
    dense = dense_run("vit")
    model, plan = dense.copy(), narrow_plan(dense)
    with pytest.raises(
        GenpruneError, match="method='ols', nearest name: .*; expected one of least_squares, bias|expected one"
    ):
        compensate(model, plan, [dense.inputs], method="ols")
    with pytest.raises(GenpruneError, match=r"guidance_scale=2 is a setting of gp.compensate; .*guidance_scale=2\)"):
        compensate(model, plan, [dense.inputs], pipeline_options={"guidance_scale": 2})
    with pytest.raises(GenpruneError, match="damping=-1; expected a number of at least 0"):
        compensate(model, plan, [dense.inputs], damping=-1)
    with pytest.raises(PlanMismatch, match="the plan is for VisionTransformer, the model is UNet2DConditionModel"):
        compensate(dense_run("unet").copy(), plan, [])
    with gp.attach_gates(model, plan), pytest.raises(PlanMismatch, match="gates are attached to .* Call handle.rem"):
        compensate(model, plan, [dense.inputs])
    with pytest.raises(BadCalibrationData, match="VisionTransformer is a bare model and got no data"):
        compensate(model, plan, None)
    with pytest.raises(GenpruneError, match="is not finite; expected finite activations"):
        compensate(model, plan, [{"x": torch.full_like(dense.inputs["x"], float("nan"))}])
    assert all(torch.equal(value, dense.model.state_dict()[key]) for key, value in model.state_dict().items())
