"""Defects of layer and operator pruning that were found by reading it again: each fails on the code before its fix."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tiny_hosts import dit, vit

import genprune as gp
from genprune.costs import site_costs
from genprune.cutting import plan_base, pruned_ops
from genprune.denoising.replay import ModelCall
from genprune.layers.candidates import removal_candidates
from genprune.layers.distances import squared_error
from genprune.layers.output_loss import OutputLoss
from genprune.operations import operation_tensors, replace_op
from genprune.operators import OPERATORS

GONE = torch.zeros(1, dtype=torch.bool)


def randomised(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.eval()


@cache
def classifier():
    """A ViT of six blocks and images for it, shared: never changed."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=6, num_heads=3, num_classes=5)
    return randomised(model), torch.randn(4, 3, 32, 32)


@cache
def walked():
    """Scores by a greedy walk for two budgets, the second of which asks for more."""
    model, images = classifier()
    method = gp.FinerCut(keep=0.9, of="params", also=(("macs", 0.6),), protect_first=0, max_consecutive=None)
    return gp.score(model, method, data=[images], progress=False)


def factored(model, path: str):
    """Low-rank factors in place of one linear layer: operation and tensors."""
    operator = OPERATORS["low_rank"].from_weights(model.get_submodule(path), {"rank": 2})
    return replace_op(path, "low_rank", {"rank": 2}), operation_tensors(path, operator)


@torch.no_grad()
def test_a_joined_plan_with_an_operator_in_a_removed_block_is_saved_and_loaded(tmp_path):
    model, images = randomised(vit()), torch.randn(2, 3, 32, 32)
    op, tensors = factored(model, "blocks.0.mlp.fc1")
    first = gp.PruningPlan(plan_base(model), {}, ops=(op,), tensors=tensors)
    after = gp.cut(randomised(vit()), first)
    joined = first.then(gp.PruningPlan(plan_base(after), {"blocks.0:block": GONE}))
    cut = gp.cut(model, joined)
    gp.save_model(cut, tmp_path / "model")
    loaded = gp.load_model(tmp_path / "model")
    assert torch.equal(loaded(images), cut(images))
    assert [each["path"] for each in pruned_ops(loaded)] == [each["path"] for each in joined.ops]


def test_a_greedy_plan_meets_the_budgets_beside_the_main_one():
    scores = walked()
    plan = scores.plan()
    assert plan.made_by["budgets"]["macs"]["reached"] <= 0.605
    loose = scores.plan(also=())
    assert loose.figures["params"] > plan.figures["params"]  # the main budget alone takes less
    with pytest.raises(gp.BudgetUnreachable, match="of macs; asked for 0.1"):
        scores.plan(also=(("macs", 0.1),))


def test_groups_are_never_left_to_a_greedy_walk():
    model, images = classifier()
    method = gp.LaptopDiff(
        keep=0.6, kinds="block", n_of_m=(1, 2), protect_first=0, additivity_sets=4, min_correlation=1.0
    )
    plan = gp.make_plan(model, method, data=[images], progress=False)
    gone = sorted(int(name.split(".")[1].split(":")[0]) for name in plan.keep)
    assert plan.made_by["selection"] == "knapsack" and [number // 2 for number in gone] == [0, 1, 2]
    with pytest.raises(gp.GenpruneError, match="greedy walk cannot hold"):
        method.changed(selection="greedy")
    greedy = gp.score(model, method.changed(n_of_m=None, selection="greedy"), data=[images], progress=False)
    with pytest.raises(gp.GenpruneError, match="greedy"):
        greedy.plan(n_of_m=(1, 2))


def test_scoring_settings_are_not_changed_after_scoring():
    with pytest.raises(gp.GenpruneError, match="scored with 'angular'"):
        walked().plan(distance="l2")
    assert walked().plan(distance="angular", also=()).keep  # the same one is no change


@pytest.mark.parametrize("value", [None, -1, 1.5])
def test_protect_first_is_a_number(value):
    """None stood for every block of the first list."""
    with pytest.raises(gp.GenpruneError, match="protect_first"):
        gp.LaptopDiff(protect_first=value)


def test_a_plan_equals_itself_on_disk(tmp_path):
    model, images = classifier()
    method = gp.LaptopDiff(keep=0.8, also=(("macs", 0.9),), additivity_sets=3)
    plan = gp.make_plan(model, method, data=[images], progress=False)
    assert plan.made_by["additivity"]["sizes"] and gp.PruningPlan.load(plan.save(tmp_path / "plan")) == plan


@torch.no_grad()
def test_rows_count_alike_in_batches_of_other_sizes():
    model, images = classifier()
    sites = gp.find_sites(model)
    candidates = removal_candidates(sites, site_costs(model, sites=sites), ("block",))[:2]
    one = OutputLoss(model, sites, [ModelCall(images)], squared_error)
    split = OutputLoss(model, sites, [ModelCall(images[:3]), ModelCall(images[3:])], squared_error)
    assert one.alone(candidates) == pytest.approx(split.alone(candidates), rel=1e-4)
    assert one.joint(candidates) == pytest.approx(split.joint(candidates), rel=1e-4)


def test_a_menu_that_offers_nothing_is_refused():
    model, images = classifier()
    method = gp.LDPruner(criterion="output_mse", menu=("separable",))
    with pytest.raises(gp.NoMatchingSites, match="separable"):
        gp.score(model, method, data=[images], progress=False)


def test_an_operator_at_an_unknown_place_is_not_attached():
    model = dit()
    plan = gp.PruningPlan(plan_base(model), {}, ops=(replace_op("transformer_blocks.0.ffn", "relu"),))
    with pytest.raises(gp.PlanMismatch, match="no module of this"):
        gp.attach_gates(model, plan)
