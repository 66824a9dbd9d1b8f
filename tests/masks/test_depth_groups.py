"""Groups of layers, draws over them and their gradients, decisions, and groups that follow from a budget."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_hosts import HOSTS

import genprune as gp
from genprune.errors import GenpruneError
from genprune.masks.depth_gates import (
    decided,
    drawn_gates,
    gumbel,
    most_likely,
    probabilities,
    straight_through_choice,
)
from genprune.masks.depth_groups import DepthGroup, fixed_groups, groups_for, sequences
from genprune.sites import Site, Sites


def layers(*paths, kind="block") -> Sites:
    return Sites.of("Host", [Site(path, kind, 1, ()) for path in paths])


def group(count, kept) -> DepthGroup:
    return DepthGroup(tuple(f"blocks.{i}:block" for i in range(count)), kept)


@pytest.mark.parametrize(("count", "kept"), [(2, 1), (4, 2), (5, 0), (3, 3), (6, 4)])
def test_every_way_to_choose_is_there_once(count, kept):
    masks = group(count, kept).masks
    expected = [list(mask) for mask in itertools.product((0.0, 1.0), repeat=count) if sum(mask) == kept]
    assert sorted(masks.tolist()) == sorted(expected) and group(count, kept).choices == len(expected)


def test_bad_groups_are_refused():
    with pytest.raises(GenpruneError, match=r"keeps 3; expected 0 to 2, .* Pass groups=\(kept, layers\)"):
        group(2, 3)
    with pytest.raises(GenpruneError, match=r"184,756 ways to keep 10 of 20 layers; expected at most 5,000"):
        group(20, 10)
    both = Sites.of("Host", [*layers("blocks.0.attn", kind="branch").values(), *layers("blocks.0").values()])
    with pytest.raises(GenpruneError, match="'blocks.0.attn:branch' lies inside 'blocks.0:block'"):
        sequences(both)


def test_runs_are_lists_of_layers():
    flux = sequences(gp.find_sites(HOSTS["flux"](), "block"))
    assert [len(run) for run in flux] == [2, 2] and flux[1][0] == "single_transformer_blocks.0:block"
    branches = sequences(gp.find_sites(HOSTS["vit"](), "branch"))
    assert branches == [tuple(f"blocks.{i}.{part}:branch" for i in range(3)) for part in ("attn", "mlp")]


def test_lists_of_one_layer_join_their_neighbours():
    one = "attentions.{}.transformer_blocks.0"
    stages = [f"down_blocks.{s}.{one.format(a)}" for s in (0, 1) for a in (0, 1)]
    found = sequences(layers(*stages, f"mid_block.{one.format(0)}"))
    assert [len(run) for run in found] == [2, 2, 1]
    found = sequences(layers(*(f"down_blocks.{s}.{one.format(0)}" for s in range(3))))
    assert [len(run) for run in found] == [3]
    # a list that is one already is not joined with another
    found = sequences(
        layers(*(f"down_blocks.{s}.attentions.0.transformer_blocks.{i}" for s in (0, 1) for i in (0, 1)))
    )
    assert [len(run) for run in found] == [2, 2]


def test_a_shorter_last_group_keeps_the_same_share_rounded_up():
    found = fixed_groups([tuple("abcdefg")], 2, 4)
    assert [(each.layers, each.kept) for each in found] == [(tuple("abcd"), 2), (tuple("efg"), 2)]
    assert [each.kept for each in fixed_groups([tuple("abc")], 1, 2)] == [1, 1]


def test_groups_for_a_budget_come_as_near_as_whole_layers_can():
    run = tuple("abcdefghijkl")
    costs = dict.fromkeys(run, 10.0)
    for target in range(0, 141):
        groups = groups_for([run], 4, costs, 140.0, float(target))
        left = 140 - sum(10 * (len(each.layers) - each.kept) for each in groups)
        assert abs(left - target) == pytest.approx(min(abs(140 - 10 * n - target) for n in range(13)))
        removed = [len(each.layers) - each.kept for each in groups]
        assert max(removed) - min(removed) <= 1  # evenly along the run


def test_groups_for_a_budget_are_of_nearly_equal_lengths():
    run = tuple("abcdefghij")
    groups = groups_for([run], 4, dict.fromkeys(run, 1.0), 10.0, 4.0)
    assert [len(each.layers) for each in groups] == [4, 3, 3] and [each.kept for each in groups] == [2, 1, 1]
    assert sum((each.layers for each in groups), ()) == run


def test_groups_of_unequal_layers_use_the_cheap_ones_for_the_rest():
    runs, costs = [tuple("ab"), tuple("cd")], {"a": 50.0, "b": 50.0, "c": 8.0, "d": 8.0}
    groups = groups_for(runs, 2, costs, 120.0, 54.0)
    assert [each.kept for each in groups] == [1, 0]


def test_draws_are_exactly_n_of_m_for_every_row_and_differ():
    groups = [group(4, 2), DepthGroup(("x", "y"), 1)]
    logits = [torch.zeros(each.choices) for each in groups]
    gates = drawn_gates(groups, logits, 200, scale=100.0, temperature=1.0, generator=torch.Generator().manual_seed(0))
    for each in groups:
        rows = torch.cat([gates[name] for name in each.layers], dim=1)  # (rows, layers)
        assert rows.shape == (200, len(each.layers)) and set(rows.unique().tolist()) == {0.0, 1.0}
        assert (rows.sum(1) == each.kept).all()
        assert len(rows.unique(dim=0)) == each.choices
        assert rows.mean(0).sub(each.kept / len(each.layers)).abs().max() < 0.12


def test_draws_follow_the_logits_whatever_the_temperature():
    logits = torch.tensor([0.0, 1.0, 2.0]) / 100
    expected = (logits * 100).softmax(0)
    uniform = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(1))
    for temperature in (4.0, 0.1):
        drawn = straight_through_choice(logits * 100, gumbel(uniform), temperature)
        assert torch.allclose(drawn.mean(0), expected, atol=0.015)


def test_the_gradient_is_that_of_the_softmax():
    """Against the derivative written out: dp_i/dl_j = p_i (1[i = j] - p_j) scale / tau, in float64."""
    torch.manual_seed(0)
    each, scale, temperature, rows = group(4, 2), 100.0, 2.5, 3
    logits = (torch.randn(each.choices, dtype=torch.float64) / 100).requires_grad_()
    weights = torch.randn(rows, 4, dtype=torch.float64)
    gates = drawn_gates(
        [each], [logits], rows, scale=scale, temperature=temperature, generator=torch.Generator().manual_seed(7)
    )
    sum((gates[name][:, 0] * weights[:, i]).sum() for i, name in enumerate(each.layers)).backward()
    noise = gumbel(torch.rand(rows, each.choices, generator=torch.Generator().manual_seed(7))).double()
    expected = torch.zeros(each.choices, dtype=torch.float64)
    for row in range(rows):
        p = ((logits.detach() * scale + noise[row]) / temperature).softmax(0)
        for j in range(each.choices):
            for i in range(each.choices):
                slope = p[i] * (float(i == j) - p[j]) * scale / temperature
                expected[j] += slope * (weights[row] @ each.masks[i].double())
    assert logits.grad.abs().max() > 1e-3
    assert torch.allclose(logits.grad, expected, rtol=1e-6, atol=1e-9)


def test_gumbel_noise_is_finite_at_both_ends():
    assert torch.isfinite(gumbel(torch.tensor([0.0, 0.5, 1.0 - 2**-24, 1.0]))).all()


def test_the_decision_is_the_best_choice_and_not_the_best_layers():
    """Layers 0 and 1 are good together only: the marginals alone would keep others."""
    each = group(4, 2)
    logits = torch.zeros(6)
    logits[0], logits[1:3], logits[3:5] = 3.0, -9.0, 2.9  # 0 and 1; 0 with 2 or 3; 1 with 2 or 3
    kept = decided(each, logits)
    assert kept == ("blocks.0:block", "blocks.1:block")
    share = probabilities(each, logits, 1.0)
    assert sum(share.values()) == pytest.approx(2) and all(0 <= value <= 1 for value in share.values())
    top = most_likely(each, {name: -index for index, name in enumerate(each.layers)})
    assert top == ("blocks.0:block", "blocks.1:block")
