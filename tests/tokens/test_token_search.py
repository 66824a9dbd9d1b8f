"""The search: never behind the default, reproducible, within budget, on exactly the layers that may go."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import genprune as gp
from genprune.metrics.bootstrap import Interval
from genprune.tokens.candidates import changed, crossed, drawn, like
from genprune.tokens.latency import Timing
from genprune.tokens.proxies import agreement, distance_between
from genprune.tokens.search import head_reads_patches

METHOD = gp.ZeroTPrune.published(keep=0.7, score="vote")


def vit(**settings):
    """A small ViT that attends to what is there: random weights alone hardly tell patches apart."""
    torch.manual_seed(0)
    given = {"depth": 5, "embed_dim": 32, "num_heads": 2, "img_size": 48, "patch_size": 8, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **{**given, **settings}).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data.normal_(std=0.25)
        block.mlp.fc2.weight.data.normal_(std=0.2)
    return model


def pictures(count=6):
    """Noise on one half, a plain colour on the other."""
    images = torch.randn(count, 3, 48, 48, generator=torch.Generator().manual_seed(3))
    images[..., 24:] = images.mean((2, 3), keepdim=True)
    return images


@pytest.fixture(scope="module")
def model():
    return vit()


@pytest.fixture(scope="module")
def found(model):
    return gp.search_tokens(model, pictures(), METHOD, trials=14, seed=1)


def test_the_result_is_not_behind_the_default(model, found):
    default, best = found.trials[0], min(found.trials, key=lambda trial: trial.distance)
    assert default.kind == "default" and best.distance < default.distance
    assert found.method.keep == best.counts
    assert {"drawn", "evolved"} <= {trial.kind for trial in found.trials}
    with gp.prune_tokens(model, METHOD) as handle:
        assert default.counts == handle.counts


def test_distances_are_those_of_the_reduced_model(model, found):
    """The table's number, computed again from outside."""
    x = pictures()
    with torch.no_grad():
        dense = model.forward_head(model.forward_features(x), pre_logits=True)
        with gp.prune_tokens(model, found.preset):
            reduced = model.forward_head(model.forward_features(x), pre_logits=True)
    distance = 1 - torch.nn.functional.cosine_similarity(dense, reduced).mean()
    assert found.preset.figures["cosine_distance"] == pytest.approx(distance.item(), abs=1e-6)


def test_every_trial_is_within_the_budget(model, found):
    for trial in found.trials:
        assert abs(trial.keep - 0.7) <= 0.02, trial  # one patch of 36 in the first layer is 2.2 %
        with gp.prune_tokens(model, METHOD.changed(keep=trial.counts, similarity_share=trial.similarity_share)) as h:
            assert h.report().keep == pytest.approx(trial.keep)
        assert max(trial.counts) < 4  # the last layer saves nothing


def test_the_same_seed_gives_the_same_trials(model, found):
    again = gp.search_tokens(model, pictures(), METHOD, trials=14, seed=1)
    assert again.trials == found.trials and again.presets == found.presets
    other = gp.search_tokens(model, pictures(), METHOD, trials=4, seed=2)
    assert other.trials[1:] != found.trials[1:4]


def test_the_model_is_as_before(model):
    x = pictures(2)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gp.search_tokens(model, x, METHOD, trials=2)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.eval()


def test_what_was_found_is_a_file(model, found, tmp_path):
    found.save(tmp_path / "preset.json")
    with gp.prune_tokens(model, tmp_path / "preset.json") as handle:
        assert handle.counts == found.method.keep
    told = json.loads(json.dumps(found.to_json()))
    assert len(told["trials"]) == len(found.trials) and told["images"] == 6
    assert "best" not in str(found) and "(default)" in str(found) and "trials on 6 images" in str(found)


def test_a_curve_from_one_search(model):
    curve = gp.search_tokens(model, pictures(3), METHOD, budgets=(0.85, 0.6), trials=4)
    assert [preset.figures["budget"] for preset in curve.presets] == [0.85, 0.6]
    assert [preset.figures["keep"] for preset in curve.presets] == pytest.approx([0.85, 0.6], abs=0.02)


def test_layers_of_the_method_bound_the_search(model):
    found = gp.search_tokens(model, pictures(2), METHOD.changed(layers=(1, 2)), trials=5)
    assert all(set(trial.counts) <= {1, 2} for trial in found.trials)


def test_tome_is_searched_without_a_similarity_share(model):
    found = gp.search_tokens(model, pictures(2), gp.ToMe(keep=0.75), trials=3, distance="kl")
    assert found.method.name == "tome" and found.trials[0].similarity_share is None and found.method.keep


def test_seconds_stop_it(model):
    found = gp.search_tokens(model, pictures(2), METHOD, trials=1000, seconds=0.0)
    assert len(found.trials) == 1


class WorkClock:
    """Times calls by their multiply-accumulates, as shares of the dense call, of which a fifth is fixed."""

    def __call__(self, calls, baseline, device, rounds, warmup):
        took = {}
        for name, call in calls.items():
            counter = FlopCounterMode(display=False)
            with counter:
                call()
            took[name] = counter.get_total_flops()
        ratio = {name: 0.2 + 0.8 * work / took[baseline] for name, work in took.items()}
        intervals = {name: Interval(value, value, value, 0.95, rounds) for name, value in ratio.items()}
        return SimpleNamespace(ratio=intervals, device="a clock of work")


def test_a_budget_of_time(model):
    timing = Timing(rounds=2, compare=WorkClock())
    found = gp.search_tokens(model, pictures(2), METHOD.changed(keep=0.8, of="latency"), trials=4, timing=timing)
    figures = found.preset.figures
    assert figures["latency"] == pytest.approx(0.8, abs=0.02) and figures["keep"] < 0.78
    assert found.method.of == "macs"  # explicit counts: nothing is timed when it is used


def test_heads_that_read_patches_keep_a_quarter(model):
    """Three tokens before the last MLP are free for a class token alone (DiffRate's schedule)."""
    pooled = vit(global_pool="avg", class_token=False)
    assert head_reads_patches(pooled) and not head_reads_patches(model)
    with pytest.raises(gp.GenpruneError, match="least=3 .* whose output is made of its patches; expected 9 to 36"):
        gp.search_tokens(pooled, pictures(2), METHOD, trials=2, least=3)
    found = gp.search_tokens(pooled, pictures(2), gp.ToMe(keep=0.75), trials=4)
    assert all(min(trial.counts.values()) >= 9 and 4 not in trial.counts for trial in found.trials)
    gp.search_tokens(model, pictures(2), METHOD, trials=2, least=3)


@pytest.mark.parametrize(
    ("images", "settings", "error", "text"),
    [
        (torch.zeros(3, 48, 48), {}, gp.BadCalibrationData, r"a batch of \(3, 48, 48\)"),
        (torch.zeros(0, 3, 48, 48), {}, gp.BadCalibrationData, "there are no calibration images"),
        (torch.full((1, 3, 48, 48), float("nan")), {}, gp.BadCalibrationData, "not finite"),
        (pictures(1), {"method": gp.ToMe(r=3)}, gp.GenpruneError, r"budget None; .* ToMe\(keep=0.65\)"),
        (pictures(1), {"method": METHOD.changed(keep=1.0)}, gp.GenpruneError, "the budget 1.0; expected"),
        (pictures(1), {"distance": "cosin"}, gp.GenpruneError, "nearest name: 'cosine'"),
        (pictures(1), {"method": METHOD.changed(layers=(4,))}, gp.GenpruneError, "no layer to search among but"),
        (pictures(1), {"method": METHOD.changed(keep=0.02)}, gp.BudgetUnreachable, "none of 2 candidates keeps 0.02"),
    ],
)
def test_what_cannot_be_searched_is_said(model, images, settings, error, text):
    with pytest.raises(error, match=text):
        gp.search_tokens(model, images, **{"method": METHOD, "trials": 2, **settings})
    assert not any(module._forward_hooks for module in model.modules())


def test_kl_needs_classes():
    with pytest.raises(gp.UnsupportedModel, match="has none; expected a classifier"):
        gp.search_tokens(vit(num_classes=0), pictures(1), METHOD, trials=1, distance="kl")


def test_distances_and_agreement():
    a, b = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [0.0, 4.0]])
    assert distance_between(a, b, "cosine") == pytest.approx(0.5)  # right angle, same direction
    assert distance_between(a, b, "mse") == pytest.approx(6 / 5)
    for name in ("cosine", "mse", "kl"):
        assert distance_between(a, a, name) == pytest.approx(0, abs=1e-7)
    p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
    expected = 0.9 * torch.tensor(0.9 / 0.5).log() + 0.1 * torch.tensor(0.1 / 0.5).log()
    assert distance_between(p.log(), q.log(), "kl") == pytest.approx(expected.item())
    assert agreement(a, b) == 0.5


def test_candidates_stay_legal():
    draw, layers = random.Random(0), (0, 1, 3, 5, 6)
    one, other = drawn(layers, True, 4, draw), drawn(layers, True, 4, draw)
    for _ in range(300):
        one, other = changed(one, layers, draw), crossed(one, other, draw)
        for candidate in (one, other):
            assert candidate.weights and set(candidate.weights) <= set(layers)
            assert 0 <= candidate.similarity_share <= 1
            counts = candidate.counts(0.5, lambda counts: min(counts.values()) / 36, 36, 2, "tokens")
            values = [36, *counts.values()]
            assert all(2 <= after < before for before, after in zip(values, values[1:]))  # every layer acts
    weights = like({1: 18, 3: 9}, 36, None).weights
    assert weights[1] == pytest.approx(weights[3])  # both hand on a half
