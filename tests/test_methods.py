"""Methods: the target is untouched, one run serves every budget, settings travel as JSON, bad input is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tiny_hosts import HOSTS, sd_unet, vit
from tiny_pipelines import ddpm_pipeline, sd_pipeline

import genprune as gp
from genprune.errors import BadCalibrationData, BudgetUnreachable, GenpruneError, NoMatchingSites, UnsupportedModel
from genprune.methods import Method, method_from_json, method_named, methods

PROMPTS = ["a cat", "two dogs"]
FAST = {"timesteps": 2, "steps": 2, "batch_size": 2}
SIZE = {"height": 8, "width": 8}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return sd_pipeline(tmp_path_factory.mktemp("sd"))


def state_of(model):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    modes = [module.training for module in model.modules()]
    return hooks, modes, [p.requires_grad for p in model.parameters()], [p.grad for p in model.parameters()]


METHODS = [gp.Random(keep=0.8), gp.Magnitude(keep=0.8), gp.Taylor(keep=0.8, **FAST), gp.OBS(keep=0.8, **FAST)]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_target_is_untouched(pipe, method):
    model = pipe.unet
    model.train()
    model.conv_in.eval()  # a mixture of modes, and of what trains
    model.conv_out.requires_grad_(False)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before, attributes = state_of(model), set(pipe.__dict__)
    plan = gp.make_plan(pipe, method, prompts=PROMPTS, operating_point=SIZE, progress=False)
    assert plan.removed()
    assert state_of(model) == before and set(pipe.__dict__) == attributes
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert type(model).__name__ == "UNet2DConditionModel"


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_same_seed_gives_the_same_plan(pipe, method):
    make = {"prompts": PROMPTS, "operating_point": SIZE, "progress": False}
    first, second = (gp.make_plan(pipe, method, **make) for _ in range(2))
    assert first == second
    if method.name != "magnitude":
        assert gp.make_plan(pipe, method, seed=1, **make).removed() != first.removed()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_plan_cuts_what_it_says(pipe, method, tmp_path):
    plan = gp.make_plan(pipe, method, prompts=PROMPTS, operating_point=SIZE, progress=False)
    plan.save(tmp_path / "plan")
    assert gp.PruningPlan.load(tmp_path / "plan") == plan
    small = gp.cut(copy.deepcopy(pipe.unet), plan)
    counted = gp.count_costs(small, **plan.operating_point)
    assert (counted.params, counted.macs) == (plan.figures["params"], plan.figures["macs"])
    text = str(plan)
    for part in ("params", "macs", "latency    not measured", "asked for keep=0.8 of params, reached "):
        assert part in text
    assert plan.made_by["method"] == method.name and plan.made_by["prompts"] == 2
    assert len(plan.made_by["prompts_sha256"]) == 64
    assert method_from_json(plan.made_by["settings"]) == method
    assert plan.made_by["budget"]["reached"] == pytest.approx(0.8, abs=0.005)


def test_one_run_serves_every_budget(pipe):
    scores = gp.score(pipe, gp.Taylor(**FAST), prompts=PROMPTS, operating_point=SIZE, progress=False)
    for keep, of in ((0.9, "params"), (0.7, "macs"), (0.8, "units")):
        direct = gp.make_plan(
            pipe, gp.Taylor(keep=keep, of=of, **FAST), prompts=PROMPTS, operating_point=SIZE, progress=False
        )
        assert scores.plan(keep=keep, of=of) == direct
    assert scores.of_kinds("heads").plan(keep=0.97).keep.keys() <= set(scores.costs.sites.of_kind("heads"))
    with pytest.raises(GenpruneError, match="Taylor has no 'minkeep', nearest name: 'min_keep'"):
        scores.plan(minkeep=0.1)


def test_taylor_finds_units_that_do_nothing(pipe):
    """A unit whose consumer ignores it has no gradient, and goes first."""
    model = copy.deepcopy(pipe.unet)
    name = "mid_block.attentions.0.transformer_blocks.0.ff:neurons"
    down = model.get_submodule(name.split(":")[0]).net[2]
    idle = torch.arange(down.in_features) % 4 == 1
    with torch.no_grad():
        down.weight[:, idle] = 0
    other = copy.copy(pipe)
    other.unet = model
    scores = gp.score(other, gp.Taylor(**FAST), prompts=PROMPTS, operating_point=SIZE, progress=False)
    assert torch.equal(scores.values[name] == 0, idle)
    plan = scores.plan(keep=0.98, kinds=("neurons",))
    assert not plan.keep[name][idle].any()


def test_bfloat16_pipelines(pipe):
    small = copy.deepcopy(pipe).to(torch.bfloat16)
    full = gp.score(pipe, gp.Taylor(**FAST), prompts=PROMPTS, operating_point=SIZE, progress=False)
    half = gp.score(small, gp.Taylor(**FAST), prompts=PROMPTS, operating_point=SIZE, progress=False)
    assert next(small.unet.parameters()).dtype == torch.bfloat16
    name = next(iter(full.costs.sites.of_kind("neurons")))
    both = torch.stack([full.values[name], half.values[name]])
    assert torch.corrcoef(both)[0, 1] > 0.9  # bfloat16 keeps 8 bits of each gradient


def test_unconditional_pipelines_and_bare_models():
    plan = gp.make_plan(ddpm_pipeline(), gp.Taylor(keep=0.8, samples=2, **FAST), progress=False)
    assert plan.made_by["budget"]["reached"] == pytest.approx(0.8, abs=0.02)
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))]
    plan = gp.make_plan(vit(), gp.Taylor(keep=0.8, of="macs"), data=batches, progress=False)
    assert plan.removed()

    def own_loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    again = gp.make_plan(vit(), gp.Taylor(keep=0.8), data=batches, loss_fn=own_loss, progress=False)
    assert again.removed()


@pytest.mark.parametrize("host", HOSTS)
def test_every_host_has_a_magnitude_plan(host):
    model = HOSTS[host]()
    plan = gp.make_plan(model, gp.Magnitude(keep=0.8))
    assert gp.count_costs(gp.cut(model, plan)).params == plan.figures["params"]


def test_latency_is_measured_on_request():
    model = sd_unet()
    plan = gp.make_plan(model, gp.Magnitude(keep=0.7), measure_latency=True)
    assert 0 < plan.figures["latency_ms"] and 0 < plan.figures["dense_latency_ms"]
    assert plan.made_by["latency_device"] in str(plan) and "not measured" not in str(plan)
    assert type(model).__name__ == "UNet2DConditionModel"


@pytest.mark.parametrize(
    "method",
    [
        gp.Random(keep=0.5, of="macs", seed=3),
        gp.Magnitude(kinds=("heads", "block"), min_keep=0.25, protect=("*attn2*",), max_width_classes=4),
        gp.Taylor(timesteps=(10, 500), weights=(1.0, 2.0), threshold=0.05, round_to=64, samples=5),
    ],
)
def test_settings_travel_as_json(method):
    assert method_from_json(json.dumps(method.to_json())) == method
    assert method_from_json(method.to_json()) == method
    assert isinstance(hash(method), int)  # frozen, no mutable field


def test_bad_json_is_refused():
    data = gp.Random().to_json()
    for change, match in (
        ({"keeep": 0.5}, "Random has no 'keeep', nearest name: 'keep'; expected keep, of"),
        ({"method": "randm"}, "no method 'randm', nearest name: 'random'; expected one of random, magnitude, taylor"),
        ({"format_version": 9}, "the method has format 9, this genprune reads up to 1. Upgrade"),
        ({"keep": 2}, "keep=2 is not a share of the dense model"),
    ):
        with pytest.raises(GenpruneError, match=match):
            method_from_json(data | change)
    for broken in ("{", "[]", {"keep": 0.5}):
        with pytest.raises(GenpruneError, match="this is no method in JSON"):
            method_from_json(broken)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"keep": 0}, r"keep=0 is not a share of the dense model; expected a number in \(0, 1\]"),
        ({"keep": 2}, r"keep=2 is not a share"),
        ({"of": "latency"}, "of='latency' is a budget of methods that remove layers"),
        ({"allocation": "unifrom"}, "allocation='unifrom', nearest name: 'uniform'"),
        ({"min_keep": 1.5}, "min_keep=1.5; expected a number from 0 to 1"),
        ({"round_to": 0}, "round_to=0; expected a whole number of at least 1"),
        ({"max_width_classes": 0}, "max_width_classes=0; expected a whole number of at least 1"),
        ({"seed": -1}, "seed=-1; expected a whole number"),
        ({"timesteps": 0}, "timesteps=0; expected a whole number of at least 1"),
        ({"timesteps": (5, 5)}, "expected different whole numbers"),
        ({"threshold": 1.0}, "threshold=1.0; expected a number from 0 to 0.999"),
        ({"weights": (-1.0,)}, "weights=-1.0; expected a number from 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, match):
    with pytest.raises(GenpruneError, match=match):
        gp.Taylor(**settings)
    with pytest.raises(NoMatchingSites, match="no kind of site is called 'haeds', nearest name: 'heads'"):
        gp.Taylor(kinds="haeds")
    with pytest.raises(NoMatchingSites, match=r"kinds=\(\) names no kind of site; expected some of .*Leave kinds out"):
        gp.Magnitude(kinds=())


def test_bad_targets_and_data_are_refused(pipe):
    method = gp.Taylor(**FAST)
    for prompts, found in ((None, "none"), ([], "none"), ("a cat", "one string")):
        with pytest.raises(BadCalibrationData, match=f"needs calibration prompts, got {found}; expected a list"):
            gp.make_plan(pipe, method, prompts=prompts, progress=False)
    with pytest.raises(BadCalibrationData, match="UNet2DConditionModel is a bare model and got no data"):
        gp.make_plan(pipe.unet, method, prompts=PROMPTS, progress=False)
    with pytest.raises(UnsupportedModel, match="Linear is not a model that genprune can prune; supported"):
        gp.make_plan(torch.nn.Linear(2, 2), gp.Random())
    with pytest.raises(NoMatchingSites, match="no site of kind 'modulation' in UNet2DConditionModel; it has heads"):
        gp.make_plan(pipe, gp.Random(kinds=("modulation",)))
    with pytest.raises(NoMatchingSites, match=r"no site matches '\*attn9\*' in UNet2DConditionModel"):
        gp.make_plan(pipe, gp.Random(protect=("*attn9*",)))
    with pytest.raises(GenpruneError, match="method is 'taylor'; expected one such as gp.Magnitude"):
        gp.make_plan(pipe, "taylor")
    with pytest.raises(BudgetUnreachable, match="cannot be reached"):
        gp.make_plan(pipe, gp.Random(keep=0.1, kinds=("heads",)))
    with pytest.raises(GenpruneError, match="an operating point has no 'size'"):
        gp.make_plan(pipe, gp.Random(), operating_point={"size": 3})


def test_pipeline_options_that_are_settings_are_refused(pipe):
    for options, advice in (
        ({"guidance_scale": 3.0}, r"guidance_scale=3.0 is a setting of gp.OBS; .* Pass gp.OBS\(guidance_scale=3.0\)"),
        ({"num_inference_steps": 2}, r"num_inference_steps=2 is a setting of gp.OBS; .* Pass gp.OBS\(steps=2\)"),
    ):
        with pytest.raises(GenpruneError, match=advice):
            gp.score(pipe, gp.OBS(**FAST), prompts=PROMPTS, pipeline_options=options, progress=False)


def test_a_failed_run_leaves_the_model_as_it_was(pipe):
    before = state_of(pipe.unet)

    def broken(model, batch):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        gp.make_plan(pipe.unet, gp.Taylor(), data=[1], loss_fn=broken, progress=False)
    assert state_of(pipe.unet) == before


def test_the_registry_lists_every_method():
    cards = {card.name: card for card in methods()}
    assert {"random", "magnitude", "taylor", "obs"} <= cards.keys()
    assert cards["taylor"].needs == ("weights", "gradients") and cards["random"].needs == ()
    assert all(card.summary for card in cards.values())
    assert method_named("taylor", keep=0.6, samples=3) == gp.Taylor(keep=0.6, samples=3)
    assert isinstance(method_named("random"), Method)
