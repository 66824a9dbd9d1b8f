"""`gp.TinyFusion`: a useless block goes, the model is untouched, runs resume to the bit, groups and budgets agree."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from mask_cases import SIZE, same_state, state_of
from tiny_hosts import HOSTS, dit, vit

import genprune as gp
from genprune.costs import site_costs
from genprune.errors import BadCalibrationData, BudgetUnreachable, GenpruneError, NoMatchingSites, PlanMismatch
from genprune.gates import gated_sites
from genprune.masks.depth_batches import BatchPool
from genprune.masks.depth_groups import DepthGroup
from genprune.masks.depth_training import DepthProblem, _Output, _Run, relative_distance
from genprune.masks.low_rank import LowRankUpdates, low_rank_tensors
from genprune.methods.tiny_fusion import TinyFusion

QUICK = {"train_steps": 3, "timesteps": 2, "samples": 2, "batch_size": 2, "steps": 2, "lora_rank": 2}


class Bare:
    """A model in the place that `state_of` reads a pipeline's denoiser from."""

    def __init__(self, model):
        self.unet = model


def score(target, data=None, prompts=None, options=None, **settings):
    run = {name: settings.pop(name) for name in ("output_dir", "resume", "checkpointing_steps") if name in settings}
    method = TinyFusion(**(QUICK | settings))
    return gp.score(target, method, data=data, prompts=prompts, pipeline_options=options, progress=False, **run)


def gone(scores, **changes) -> list[str]:
    return sorted(name for name, mask in scores.plan(**changes).keep.items() if not mask.any())


def labelled(batches=4, rows=8):
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(rows, 3, 32, 32, generator=generator), torch.randint(0, 5, (rows,), generator=generator))
        for _ in range(batches)
    ]


def six_blocks(**changes):
    import timm

    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **size | changes)


@torch.no_grad()
def loud_but(model, useless):
    """A ViT whose blocks all change its output a good deal, but for these, which return their input."""
    torch.manual_seed(1)
    for index, block in enumerate(model.blocks):
        for layer in (block.attn.proj, block.mlp.fc2):
            for tensor in (layer.weight, layer.bias):
                tensor.zero_() if index in useless else tensor.normal_(std=0.5)
    return model


def test_useless_blocks_are_the_ones_that_go():
    model = loud_but(six_blocks(), useless=(1, 2, 5))
    scores = score(model, labelled(), groups=(1, 2), train_steps=40, learning_rate=5e-3)
    assert gone(scores) == ["blocks.1:block", "blocks.2:block", "blocks.5:block"]
    assert all(float(scores.values[f"blocks.{index}:block"]) < 0.3 for index in (1, 2, 5))
    images = labelled()[0][0]
    small = gp.cut(copy.deepcopy(model).eval(), scores.plan())
    assert torch.allclose(small(images), model.eval()(images), atol=1e-5)


def test_the_tasks_loss_alone_finds_a_harmful_block():
    """Without distillation: all other blocks return their input, and one drowns the class that the rest tells."""
    # a class token that no attention fills would see no image
    model = loud_but(six_blocks(class_token=False, global_pool="avg"), useless=range(6))
    torch.nn.init.normal_(model.head.weight)
    images = labelled(rows=32)[0][0]
    data = [(images, model.eval()(images).argmax(1).detach())]
    torch.nn.init.normal_(model.blocks[3].mlp.fc2.weight, std=5.0)
    scores = score(model, data, groups=(1, 2), train_steps=40, learning_rate=5e-3, distillation=0.0, lora_rank=0)
    assert "blocks.3:block" in gone(scores) and float(scores.values["blocks.3:block"]) < 0.2


def test_the_model_is_untouched_by_lora_gates_and_errors():
    model = vit().train()
    model.head.requires_grad_(False)
    before, images = state_of(Bare(model)), labelled()[0][0]
    output = copy.deepcopy(model).eval()(images)
    score(model, labelled())
    assert same_state(state_of(Bare(model)), before) and not gated_sites(model)
    with pytest.raises(GenpruneError, match="the loss of step 1 is nan; expected a finite one"):
        score(model, [(images * float("nan"), labelled()[0][1])])
    assert same_state(state_of(Bare(model)), before) and not gated_sites(model)
    assert torch.equal(model.eval()(images), output)


def test_lora_is_the_written_out_update_and_learns():
    model, x = vit().eval(), labelled()[0][0]
    tensors = low_rank_tensors(model, ["blocks.1"], rank=2, seed=0)
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert set(tensors) == {f"blocks.1.{layer}/{part}" for layer in layers for part in ("down", "up")}
    dense = model(x)
    with LowRankUpdates(model, tensors, alpha=16.0) as updates:
        assert torch.equal(model(x), dense)  # starts at zero
        for name in tensors:
            torch.nn.init.normal_(tensors[name], std=0.1)
        changed = model(x)
        with updates.off():
            assert torch.equal(model(x), dense)
    merged = copy.deepcopy(model)
    for layer in layers:
        down, up = (tensors[f"blocks.1.{layer}/{part}"] for part in ("down", "up"))
        merged.get_submodule(f"blocks.1.{layer}").weight.data += 16 / 2 * up @ down
    assert torch.allclose(changed, merged(x), atol=1e-5) and not torch.allclose(changed, dense, atol=1e-2)
    assert torch.equal(model(x), dense)


def test_low_rank_updates_are_trained(tmp_path):
    from safetensors.torch import load_file

    score(vit(), labelled(), output_dir=tmp_path)
    tensors = load_file(next(tmp_path.glob("checkpoint-*")) / "training.safetensors")
    ups = [value for name, value in tensors.items() if name.startswith("logits/lora/") and name.endswith("/up")]
    assert ups and all(value.abs().max() > 0 for value in ups)
    assert len(json.loads((tmp_path / "curve.json").read_text())) == 3


def test_the_model_to_be_near_is_whole_and_without_updates():
    model, data = vit().eval(), labelled()
    groups = [DepthGroup(tuple(f"blocks.{index}:block" for index in range(3)), 1)]
    settings = TinyFusion(**QUICK)
    run = _Run(
        DepthProblem(model, gp.find_sites(model), groups, BatchPool(model, settings, 0, data=data)), settings, 0
    )
    batch = run.problem.batches.batch(0)
    with torch.no_grad():
        dense = model(batch.images)
        for name, values in run.updates.tensors.items():
            values.normal_(generator=torch.Generator().manual_seed(len(name)))
    with run.updates, run.gates(), _Output(model) as output:
        run._set({name: torch.zeros(1) for name in groups[0].layers})
        assert torch.equal(run._dense(batch, output), dense)
        assert not torch.allclose(model(batch.images), dense, atol=1e-2)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    data = labelled()
    whole = score(vit(), data, train_steps=6, output_dir=tmp_path / "whole")

    class Stopping(list):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            if self.reads == 5:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    part = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        score(vit(), Stopping(data), train_steps=6, output_dir=part, checkpointing_steps=2)
    assert [path.name for path in part.glob("checkpoint-*")][-1] in ("checkpoint-000002", "checkpoint-000004")
    with pytest.raises(GenpruneError, match="has checkpoints of an earlier training"):
        score(vit(), data, train_steps=6, output_dir=part)
    with pytest.raises(PlanMismatch, match="was made with train_steps=6, this run has 7"):
        score(vit(), data, train_steps=7, output_dir=part, resume=True)
    resumed = score(vit(), data, train_steps=6, output_dir=part, resume=True)
    assert all(torch.equal(resumed.values[name], whole.values[name]) for name in whole.values)
    one, other = (json.loads((folder / "curve.json").read_text()) for folder in (tmp_path / "whole", part))
    assert one == other
    again = score(vit(), data, train_steps=6)
    assert all(torch.equal(again.values[name], whole.values[name]) for name in whole.values)
    seed = score(vit(), data, train_steps=6, seed=1)
    assert any(not torch.equal(seed.values[name], whole.values[name]) for name in whole.values)


@pytest.mark.parametrize("case", ["sd", "flux", "ddpm"])
def test_pipelines_are_trained_on_their_own_pictures(case, request):
    pipe = request.getfixturevalue(case)
    before = state_of(pipe)
    prompts = None if case == "ddpm" else ["a cat", "two dogs"]
    options = {"sd": SIZE, "flux": {"max_sequence_length": 16} | SIZE, "ddpm": {}}[case]
    kinds = {"sd": ("branch",), "flux": ("block",), "ddpm": ("branch",)}[case]
    scores = score(pipe, prompts=prompts, options=options, kinds=kinds, groups=(1, 2))
    assert same_state(state_of(pipe), before)
    for group in scores.made_by["depth"]:
        assert len(group["kept"]) == -(-len(group["layers"]) // 2)
        assert sum(float(scores.values[name]) for name in group["layers"]) == pytest.approx(len(group["kept"]))
    assert scores.made_by["training"]["steps"] == 3
    json.dumps(dict(scores.made_by))
    model = pipe.transformer if case == "flux" else pipe.unet
    small = gp.cut(copy.deepcopy(model), scores.plan())
    assert gp.count_costs(small).params < gp.count_costs(model).params


def test_a_bare_denoiser_with_its_own_inputs():
    model = dit()
    inputs = {
        "hidden_states": torch.randn(3, 4, 8, 8),
        "timestep": torch.tensor([1, 500, 900]),
        "class_labels": torch.tensor([0, 1, 2]),
    }
    scores = score(model, [(inputs, torch.randn(3, 4, 8, 8))], groups=(2, 3))
    assert len(gone(scores)) == 1


def test_groups_follow_from_the_budget():
    model = six_blocks()
    dense = gp.count_costs(model)
    scores = score(model, labelled(), keep=0.6, of="macs")
    for keep in (0.6, 0.3, 0.85):
        small = gp.cut(copy.deepcopy(model), scores.plan(keep=keep))
        block = dense.within("blocks.0").macs / dense.macs
        assert gp.count_costs(small).macs / dense.macs == pytest.approx(keep, abs=block / 2 + 1e-9)
    assert score(model, labelled(), keep=1.0).plan().keep == {}
    assert len(gone(scores, of="units", keep=0.5)) == 3
    assert scores.plan(of="units", keep=0.5).made_by["budget"] == {"keep": 0.5, "of": "units", "reached": 0.5}


def test_another_budget_keeps_the_likeliest_layers_of_each_group():
    scores = score(six_blocks(), labelled(), groups=(1, 2))
    values = {name: float(value) for name, value in scores.values.items()}
    kept = set(values) - set(gone(scores, groups=(1, 3)))
    for start in (0, 3):
        names = [f"blocks.{index}:block" for index in range(start, start + 3)]
        assert kept & set(names) == {max(names, key=values.get)}


def test_the_plan_is_the_decision_and_not_the_likeliest_layers():
    scores = score(six_blocks(), labelled(), groups=(2, 3))
    least = {layers: tuple(sorted(layers, key=lambda name: scores.values[name])[:2]) for layers in scores.decisions}
    other = dataclasses.replace(scores, decisions=least)
    assert gone(other) == sorted(set(scores.values) - set(sum(least.values(), ()))) != gone(scores)
    assert gone(other, groups=(1, 3)) == gone(scores, groups=(1, 3))


def test_what_is_protected_stays():
    scores = score(six_blocks(), labelled(), groups=(0, 2), protect=("blocks.0.attn:heads", "blocks.5*"))
    assert gone(scores) == [f"blocks.{index}:block" for index in (1, 2, 3, 4)]
    assert float(scores.values["blocks.0:block"]) == 1.0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"groups": (1, 2), "keep": 0.9}, BudgetUnreachable, r"groups=\(1, 2\) keep 0\.\d+ of the params .* keep=0.9"),
        ({"keep": 0.01}, BudgetUnreachable, r"keep=0.01 of params cannot be reached .* the nearest is 0\.\d+"),
        ({"keep": 0.5, "protect": ("blocks.*",)}, NoMatchingSites, "covers all 3 sites"),
        ({"groups": (3, 2)}, GenpruneError, r"groups=\(3, 2\); expected \(kept, layers\)"),
        ({"group_size": 0}, GenpruneError, "group_size=0; expected a whole number"),
        ({"temperatures": (4.0, 0.0)}, GenpruneError, r"temperatures=\(4.0, 0.0\); expected two numbers above 0"),
        ({"ema_decay": 1.0}, GenpruneError, "ema_decay=1.0; expected a number in"),
        ({"lora_rank": -1}, GenpruneError, "lora_rank=-1; expected a whole number of at least 0"),
        ({"keep": 0.0}, GenpruneError, "keep=0.0 is not a share of the dense model"),
        ({"kinds": ("heads",)}, NoMatchingSites, "no score for sites of kind 'heads'"),
        ({"kinds": ("block", "branch")}, GenpruneError, "lies inside 'blocks.0:block'"),
    ],
)
def test_bad_settings_are_refused_before_any_training(settings, error, message):
    class Untouched(list):
        def __getitem__(self, index):
            raise AssertionError("a batch was read")

    with pytest.raises(error, match=message):
        score(vit(), Untouched(labelled()), **settings)


def test_groups_that_meet_the_budget_may_say_so():
    model = six_blocks()
    costs = site_costs(model)
    half = 1 - 3 * costs.unit("blocks.0:block").params / costs.total.params
    assert len(gone(score(model, labelled(), groups=(1, 2), keep=half))) == 3


def test_a_model_whose_layers_have_no_neighbours_is_refused(sd):
    with pytest.raises(NoMatchingSites, match=r"no 2 layers of kinds wrapper follow each other|lies inside"):
        score(HOSTS["ddpm"](), [({}, torch.zeros(1))], kinds=("wrapper",), protect=("*mid*", "*up*"))


def test_bad_data_is_refused(sd):
    with pytest.raises(BadCalibrationData, match="is a bare model and got no data"):
        score(vit())
    with pytest.raises(BadCalibrationData, match="needs calibration prompts"):
        score(sd, options=SIZE, kinds=("branch",))
    with pytest.raises(GenpruneError, match=r"is a setting of gp.TinyFusion"):
        score(sd, prompts=["a"], options={"guidance_scale": 3.0}, kinds=("branch",))
    scored = gp.score(
        vit(),
        TinyFusion(**QUICK | {"distillation": 0.0}),
        data=labelled(),
        loss_fn=lambda model, batch: model(batch[0]).square().mean(),
        progress=False,
    )
    assert scored.made_by["training"]["steps"] == 3
    with pytest.raises(BadCalibrationData, match="called no model; expected one call of it"):
        gp.score(vit(), TinyFusion(**QUICK), data=[1], loss_fn=lambda model, batch: torch.ones(()), progress=False)


def test_settings_round_trip_as_json():
    method = TinyFusion(keep=0.5, of="macs", groups=(1, 2), kinds=("block",), temperatures=(2.0, 0.5))
    data = json.loads(json.dumps(method.to_json()))
    assert (
        TinyFusion(**{name: value for name, value in data.items() if name not in ("method", "format_version")})
        == method
    )
    assert TinyFusion().keep is None and TinyFusion().changed(keep=0.5).keep == 0.5
    assert method.temperature(0) == 2.0 and method.temperature(method.train_steps - 1) == pytest.approx(0.5)
    assert method.decay(0) == 0.1 and method.decay(10**6) == method.ema_decay


def test_the_distance_is_relative_by_row():
    dense = torch.tensor([[3.0, 4.0], [0.0, 100.0]])
    found = relative_distance(dense * torch.tensor([[1.1], [1.2]]), dense)
    assert float(found) == pytest.approx((0.01 + 0.04) / 2)


def test_a_model_that_was_cut_can_be_learned_on(tmp_path):
    model = six_blocks()
    narrow = gp.make_plan(model, gp.Magnitude(keep=0.6, kinds=("heads", "neurons"), min_keep=0.0))
    first = gp.cut(model, narrow)
    second = gp.cut(first, gp.make_plan(first, gp.Random(keep=0.5, kinds=("block",))))
    scores = score(second, labelled(), groups=(1, 2))
    left = gp.find_sites(second, "block")
    assert len(gone(scores)) == len(left) // 2
    small = gp.cut(second, scores.plan())
    assert gp.count_costs(small).params == scores.plan().figures["params"] < scores.plan().figures["dense_params"]
