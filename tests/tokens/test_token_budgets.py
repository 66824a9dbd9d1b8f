"""Budgets of tokens: whole MACs with scoring, measured time, what cannot be met; handles found again."""

from __future__ import annotations

import copy
import json
import pickle
import random
from types import SimpleNamespace

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import genprune as gp
from genprune.metrics.bootstrap import Interval
from genprune.tokens.costs import TokenCosts, reference_flops
from genprune.tokens.handle import handle_of
from genprune.tokens.hosts import host_of
from genprune.tokens.latency import TimeModel, Timing

SMALL = {"embed_dim": 32, "num_heads": 2, "num_classes": 5}
MODELS = {
    "vit": ("vit_tiny_patch16_224", {"depth": 6, "img_size": 48, "patch_size": 8, **SMALL}),
    "gap": (
        "vit_tiny_patch16_224",
        {"depth": 4, "img_size": 64, "patch_size": 8, "global_pool": "avg", "class_token": False, **SMALL},
    ),
    "pool": ("vit_base_patch16_siglip_224", {"depth": 4, "img_size": 48, "patch_size": 8, **SMALL}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"depth": 5, "img_size": 84, "patch_size": 14, **SMALL}),
    "rotary": ("eva02_tiny_patch14_224", {"depth": 4, "img_size": 84, "patch_size": 14, **SMALL}),
}


def built(name: str):
    torch.manual_seed(0)
    entry, settings = MODELS[name]
    return timm.create_model(entry, **settings).eval().requires_grad_(False)  # the counter tracks gradients


def image(model, batch=1):
    size = model.patch_embed.img_size
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def flops(model, *inputs) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(*inputs)
    return counter.get_total_flops() // 2


@pytest.fixture(scope="module")
def vit():
    return built("vit")


METHODS = {
    "default": gp.ZeroTPrune(),
    "published": gp.ZeroTPrune.published(),
    "nearest": gp.ZeroTPrune.published(restore="nearest", score="vote"),
    "tome": gp.ToMe(keep=0.65),
}


@pytest.mark.parametrize("name", MODELS)
def test_costs_are_what_a_real_call_does(name):
    """At arbitrary counts, both placements, scoring included, to the last multiply-accumulate."""
    model, draw = built(name), random.Random(0)
    host = host_of(model)
    costs, x = TokenCosts(host), image(model)
    assert costs.dense == flops(model, x)
    for placement in ("after_block", "before_mlp"):
        for method in METHODS.values():
            now, counts = host.patches, {}
            for layer in sorted(draw.sample(range(len(host.paths)), 2)):
                now = counts[layer] = draw.randint(now - now // 2, now - 1)
            with gp.prune_tokens(model, method.changed(keep=counts, placement=placement)) as handle:
                settled = handle.method
                real = flops(model, x)
            assert costs.total(counts, settled) == real, (method, placement, counts)
            assert handle.report().total_macs == real
            assert abs(costs.rough(counts, settled) - real) < 0.02 * real


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_a_budget_is_of_the_whole_model_with_scoring(name, method):
    model = built(name)
    x = image(model)
    dense = flops(model, x)
    with gp.prune_tokens(model, METHODS[method].changed(keep=0.8)) as handle:
        for keep in (0.8, 0.7):
            handle.set(keep=keep)
            real = flops(model, x) / dense
            assert abs(real - keep) <= max(0.005, _smallest_step(handle) / 2), handle.report()
            report = handle.report()
            assert (report.keep, report.asked) == (real, keep) and report.miss == pytest.approx(real - keep)
            assert f"missed by {real - keep:+.4f}" in str(report)


def _smallest_step(handle) -> float:
    """The smallest change of the cost by one patch more in one layer, as a share of the dense cost."""
    counts, method, steps = handle.counts, handle.method, []
    for layer, count in counts.items():
        before = min((one for other, one in counts.items() if other < layer), default=handle.report().patches[0])
        if count < before:
            steps.append(handle.costs.total({**counts, layer: count + 1}, method) - handle.costs.total(counts, method))
    return min((step for step in steps if step > 0), default=0) / handle.costs.dense


def test_published_operations_of_deit_small():
    keep = gp.token_presets()["deit-.9-.8-.7"].method.keep
    now, counts = 196, {}
    for layer, rate in keep.items():
        now = counts[layer] = int(now * rate)
    assert counts == {2: 176, 5: 140, 8: 98}
    assert reference_flops(384, 12, counts) == 3_554_802_816


def test_the_report_in_json_has_every_number(vit):
    with gp.prune_tokens(vit, gp.ZeroTPrune.published(keep=0.7)) as handle:
        told = json.loads(json.dumps(handle.report().to_json()))
    assert len(told["patches"]) == len(told["macs"]) == 6 and told["patches"][0] == 36
    assert sum(told["macs"]) + told["scoring_macs"] <= told["total_macs"] < told["dense_macs"]
    assert told["scoring_macs"] > 0 and told["keep"] == told["total_macs"] / told["dense_macs"]


class WorkClock:
    """Times calls by the multiply-accumulates that they do, and by what each layer that reduces costs beside them.

    Takes the place of the timing function; model and hooks are real.
    """

    def __init__(self, fixed: float, each: float = 0.0):
        self.fixed, self.each, self.runs, self.rows = fixed, each, 0, None

    def __call__(self, calls, baseline, device, rounds, warmup):
        self.runs += 1
        took = {}
        for name, call in calls.items():
            counter = FlopCounterMode(display=False)
            with counter:
                self.rows = len(call())
            layers = 0 if call.state is None else sum(kept is not None for kept in call.schedule)
            took[name] = counter.get_total_flops(), layers
        dense = took[baseline][0]
        ratio = {
            name: self.fixed + (1 - self.fixed) * work / dense + self.each * layers
            for name, (work, layers) in took.items()
        }
        intervals = {name: Interval(value, value, value, 0.95, rounds) for name, value in ratio.items()}
        return SimpleNamespace(ratio=intervals, device="a clock of work")


def test_a_budget_of_time_is_met_and_reported(vit):
    clock = WorkClock(fixed=0.2, each=0.02)
    timing = Timing(batch_size=3, rounds=2, compare=clock)
    with gp.prune_tokens(vit, gp.ZeroTPrune.published(keep=0.8, of="latency"), timing=timing) as handle:
        report = handle.report()
        assert clock.rows == 3
        assert report.measured.share == pytest.approx(0.8, abs=0.015) and report.miss == report.measured.share - 0.8
        assert report.keep < 0.74  # MACs have to fall by more than time does
        assert "of latency, missed by" in str(report) and "batch 3" in str(report)
        runs = clock.runs
        handle.set(keep=0.7)
        assert handle.report().measured.share == pytest.approx(0.7, abs=0.015)
        assert clock.runs - runs <= 4  # the line is there already
    with gp.prune_tokens(vit, gp.ZeroTPrune.published(keep=0.8)) as handle:
        assert handle.report().measured is None


def test_time_that_does_not_fall_is_out_of_reach(vit):
    timing = Timing(rounds=2, compare=WorkClock(fixed=0.95, each=0.02))
    with pytest.raises(gp.BudgetUnreachable, match=r"keep=0.8 of the measured time .* Raise keep"):
        gp.prune_tokens(vit, gp.ZeroTPrune.published(keep=0.8, of="latency"), timing=timing)
    assert not any(module._forward_hooks for module in vit.modules())


def test_the_line_through_measured_times():
    line = TimeModel(0.7, 0.03)
    points = [(macs, layers, line.share(macs, layers)) for macs, layers in ((0.9, 1), (0.7, 3), (0.5, 2))]
    found = TimeModel.through(points)
    assert (found.slope, found.each) == pytest.approx((0.7, 0.03))


def test_measuring_leaves_the_model_alone(vit):
    x = image(vit)
    with gp.prune_tokens(vit, gp.ZeroTPrune.published(keep=0.7)) as handle:
        before, state = vit(x), dict(handle._state.__dict__)
        took = handle.measure()
        assert took.low <= took.share <= took.high and took.batch_size == 1
        assert handle._state.schedule == state["schedule"] and torch.equal(vit(x), before)


@pytest.mark.parametrize(
    ("method", "error", "text"),
    [
        (gp.ZeroTPrune(keep=0.7, layers=(2, 6)), gp.NoMatchingSites, "there is no layer 6: .* has 6, numbered 0 to 5"),
        (gp.ZeroTPrune(keep={6: 0.5}), gp.NoMatchingSites, "there is no layer 6"),
        (gp.ZeroTPrune(keep={1: 10, 2: 20}), gp.GenpruneError, "layer 2 is to hand on 20 .* expected 1 to 10"),
        (gp.ZeroTPrune(keep={1: 40}), gp.GenpruneError, "layer 1 is to hand on 40 .* expected 1 to 36"),
        (gp.ZeroTPrune.published(keep=0.05), gp.BudgetUnreachable, r"keep=0.05 of MACs .*it is 0\.\d+. Raise keep"),
        (gp.ZeroTPrune.published(keep={5: 10}), gp.GenpruneError, "after layer 5 alone, the last one, which saves"),
        (gp.ToMe(keep={1: 10}), gp.GenpruneError, "layer 1 is to hand on 10 of 36 .* merges pairs, so that 18 stay"),
        (gp.ZeroTPrune(keep=0.9999), gp.GenpruneError, "removes none of the 36 patches .* Lower keep"),
    ],
)
def test_what_cannot_be_is_said_and_leaves_no_hook(vit, method, error, text):
    with pytest.raises(error, match=text):
        gp.prune_tokens(vit, method)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vit.modules())


def test_everything_kept_may_be_asked_for(vit):
    x = image(vit, 2)
    before = vit(x)
    for method in (gp.ZeroTPrune(keep=1.0), gp.ZeroTPrune(keep={2: 1.0}), gp.ZeroTPrune(keep={2: 36}), gp.ToMe(r=0)):
        with gp.prune_tokens(vit, method) as handle:
            assert torch.equal(vit(x), before)
            assert handle.report().keep == 1.0


def test_a_number_above_half_is_said(vit):
    with pytest.warns(UserWarning, match="r=30 is above half of the 36 patches; .* 18, 9, 5, 3, 2, 1. Lower r"):
        gp.prune_tokens(vit, gp.ToMe(r=30)).remove()


def test_a_failed_switch_leaves_the_old_setting(vit):
    x = image(vit)
    with gp.prune_tokens(vit, gp.ZeroTPrune.published(keep=0.7)) as handle:
        before, counts = vit(x), handle.counts
        with pytest.raises(gp.BudgetUnreachable):
            handle.set(keep=0.01)
        with pytest.raises(gp.GenpruneError, match="has no 'keeep', nearest name: 'keep'"):
            handle.set(keeep=0.5)
        assert handle.counts == counts and handle.method.keep == 0.7 and torch.equal(vit(x), before)


def test_a_second_reduction_is_refused(vit):
    with gp.prune_tokens(vit, gp.ZeroTPrune(keep=0.8)):
        with pytest.raises(gp.GenpruneError, match=r"are reduced already; .* set\(...\)"):
            gp.prune_tokens(vit, gp.ZeroTPrune(keep=0.8))


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("way", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
def test_a_copy_has_a_handle_of_its_own(vit, way):
    x = image(vit)
    dense = vit(x)
    with gp.prune_tokens(vit, gp.ZeroTPrune.published(keep=0.7)) as handle:
        reduced, twin = vit(x), way(vit)
        found = handle_of(twin)
        assert found.counts == handle.counts and found.model is twin and found.method == handle.method
        assert torch.equal(twin(x), reduced)
        found.set(keep=0.5)
        assert not torch.equal(twin(x), reduced) and torch.equal(vit(x), reduced)
        found.remove()
        assert torch.equal(twin(x), dense) and torch.equal(vit(x), reduced)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
    assert not any(getattr(module, kind) for module in twin.modules() for kind in hooks)
    assert not {"forward_intermediates", "forward_head"} & set(vars(twin))
    with pytest.raises(gp.GenpruneError, match="no tokens are reduced on this VisionTransformer"):
        handle_of(twin)
