"""`DiffusionTokens`: checks, JSON, changes; and what `Steps` makes of a chain."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import genprune as gp
from genprune.tokens.choice import LayerView
from genprune.tokens.denoising_steps import Steps, fewer, heads_of_groups
from genprune.tokens.diffusion import DiffusionTokens
from genprune.tokens.methods import TokenMethod

VIEW = LayerView(prefix=0, class_token=False, scale=0.5, wants_target=True)
METHOD = gp.ZeroTPrune(score="vote", similarity_share=0.0, reduce="drop")


def test_settings_survive_json_and_a_file(tmp_path):
    settings = DiffusionTokens(
        gp.ToMe(keep={3: 0.9, 6: 20}), tokens=0.5, around="attention", restore="own", early=((0.2, 0.5), (0.5, 0.8)),
        every=3, guidance="apart", operating_point={"height": 16},
    )  # fmt: skip
    assert DiffusionTokens.from_json(settings.to_json()) == settings
    settings.save(tmp_path / "tokens.json")
    found = DiffusionTokens.load(tmp_path / "tokens.json")
    assert found == settings
    assert isinstance(found.early, tuple) and isinstance(found.early[0], tuple)
    assert found.method.keep == {3: 0.9, 6: 20} and isinstance(found.method.keep[6], int)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tokens": 0.0}, "tokens=0.0"),
        ({"tokens": 1.5}, "tokens=1.5"),
        ({"around": "blok"}, "around='blok'"),
        ({"restore": "copy"}, "restore='copy'"),
        ({"every": 0}, "every=0"),
        ({"guidance": True}, "guidance=True"),
        ({"early": ((0.5, 0.5), (0.2, 0.5))}, "rising"),
        ({"early": ((0.5, 1.5),)}, "factor"),
        ({"early": 0.5}, "pairs"),
        ({"method": 0.5}, "expected a token method"),
        ({"operating_point": 64}, "operating_point=64"),
    ],
)
def test_bad_values_are_refused_with_what_was_expected(values, said):
    with pytest.raises(gp.GenpruneError, match=said) as error:
        DiffusionTokens(**values)
    assert "expected" in str(error.value) and "Pass" in str(error.value)


def test_changes_go_to_the_settings_or_to_the_method():
    settings = DiffusionTokens(METHOD, tokens=0.5)
    changed = settings.changed(every=2, keep=0.8)
    assert (changed.every, changed.method.keep) == (2, 0.8)
    assert changed.tokens is None, "a new keep takes the place of tokens"
    assert settings.changed(score="random").tokens == 0.5
    with pytest.raises(gp.GenpruneError, match="evry.*every"):
        settings.changed(evry=2)


def test_other_json_is_refused():
    with pytest.raises(gp.GenpruneError, match="no diffusion token settings"):
        DiffusionTokens.from_json(METHOD.to_json())
    newer = {**DiffusionTokens(METHOD).to_json(), "format_version": 9}
    with pytest.raises(gp.GenpruneError, match="format 9"):
        DiffusionTokens.from_json(newer)
    with pytest.raises(gp.GenpruneError, match="colour"):
        DiffusionTokens.from_json({**DiffusionTokens(METHOD).to_json(), "colour": 1})


def test_fewer_tokens_go_where_the_factor_is_below_one():
    assert [fewer(100, 40, factor) for factor in (1.0, 0.5, 0.0)] == [40, 70, 100]
    assert fewer(3, 0, 1.0) == 1


def test_rows_that_share_are_heads_of_one_graph():
    """The choice for two rows together is the choice for their heads side by side, computed by hand."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 3, 10, 8)  # rows 0, 1 and once more 0, 1 under another condition
    together = METHOD.choose(heads_of_groups(query, 2), heads_of_groups(key, 2), 5, VIEW)
    for row in range(2):
        votes = torch.cat(
            [(query[i].double() @ key[i].double().mT * 0.5).softmax(-1) for i in (row, row + 2)]
        )  # (2 H, n, n)
        scores = votes.sum(1)  # mean 1
        variance = scores.var(-1, unbiased=False)
        stays = (variance >= 0.01) & (variance <= 0.7)
        scores = (scores[stays] if stays.any() else scores).square().mean(0).sqrt()
        assert together.kept[row].tolist() == sorted(scores.topk(5).indices.tolist())


def _pair(rows: int = 4, tokens: int = 12):
    return torch.randn(2, rows, 2, tokens, 4)


def _chosen(steps: Steps, latents, timestep, keep: int = 5):
    """One call of a denoiser with one layer, and other queries in each: the choice, and whether it is a new one."""
    steps.begin(latents, timestep)
    known = steps.remembered(0, len(latents), 12, keep)
    if known is not None:
        return known, False
    query, key = _pair(len(latents))
    return steps.choose(0, METHOD, query, key, keep, VIEW), True


def test_guidance_shares_one_choice_and_other_rows_do_not():
    torch.manual_seed(0)
    latents = torch.randn(2, 3)
    kept = _chosen(Steps(DiffusionTokens(METHOD)), torch.cat([latents, latents]), 900)[0].kept
    assert torch.equal(kept[:2], kept[2:]) and not torch.equal(kept[0], kept[1])
    kept = _chosen(Steps(DiffusionTokens(METHOD)), torch.randn(4, 3), 900)[0].kept
    assert not torch.equal(kept[:2], kept[2:])
    kept = _chosen(Steps(DiffusionTokens(METHOD, guidance="apart")), torch.cat([latents, latents]), 900)[0].kept
    assert not torch.equal(kept[:2], kept[2:])
    kept = _chosen(Steps(DiffusionTokens(METHOD, guidance="shared")), torch.randn(4, 3), 900)[0].kept
    assert torch.equal(kept[:2], kept[2:]), "shared: without looking"
    thirds = torch.randn(1, 3).repeat(3, 1)
    kept = _chosen(Steps(DiffusionTokens(METHOD)), thirds, 900)[0].kept
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])


def test_the_second_call_of_a_step_takes_the_choice_of_the_first():
    latents, others = torch.randn(2, 3), torch.randn(2, 3)
    steps = Steps(DiffusionTokens(METHOD))
    first, _ = _chosen(steps, latents, torch.tensor([0.9, 0.9]))
    second, new = _chosen(steps, latents.clone(), torch.tensor([0.9, 0.9]))
    assert not new and second is first
    assert _chosen(steps, others, torch.tensor([0.9, 0.9]))[1], "other latents at the same timestep"
    assert _chosen(steps, others, torch.tensor([0.8, 0.8]))[1], "the next step"
    apart = Steps(DiffusionTokens(METHOD, guidance="apart", every=2))
    _chosen(apart, latents, 900)
    assert _chosen(apart, latents, 900)[1]


def test_scores_are_used_again_for_so_many_steps_and_a_new_chain_scores():
    steps = Steps(DiffusionTokens(METHOD, every=3))
    new = [_chosen(steps, torch.randn(2, 3), timestep)[1] for timestep in (900, 800, 700, 600, 500)]
    assert new == [True, False, False, True, False]
    assert _chosen(steps, torch.randn(2, 3), 900)[1], "the timestep rose: a new chain"
    assert not _chosen(steps, torch.randn(2, 3), 800)[1]
    assert _chosen(steps, torch.randn(1, 3), 700)[1], "another batch"
    assert _chosen(steps, torch.randn(1, 3), 690, keep=4)[1], "another count"


def test_early_steps_remove_fewer_tokens():
    steps = Steps(DiffusionTokens(METHOD, early=((0.25, 0.0), (0.5, 0.5))))
    factors = []
    for timestep in (1000, 800, 740, 600, 400, 10, 500, 100):
        steps.begin(torch.randn(1, 3), timestep)
        factors.append(steps.factor)
    assert factors == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 0.0, 1.0], "500 after 10 begins a new chain"


def test_nothing_is_looked_at_where_nothing_needs_it():
    steps = Steps(DiffusionTokens(METHOD, guidance="apart"))
    steps.begin(torch.empty(2, 3), None)  # a timestep would be read otherwise
    assert (steps.groups, steps.reuse, steps.factor) == (1, False, 1.0)
    steps.begin(torch.empty(2, 3, device="meta"), None)


def test_copies_forget_the_call():
    steps = Steps(DiffusionTokens(METHOD, every=3))
    _chosen(steps, torch.randn(2, 3), 900)
    for twin in (copy.deepcopy(steps), pickle.loads(pickle.dumps(steps))):
        assert twin.settings == steps.settings and not twin.chosen and twin is not steps


def test_scoring_4096_tokens_stays_below_one_map():
    """Row 21: no tensor that scoring makes comes near one map of 10 heads (640 MiB)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        largest = total = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            for one in found if isinstance(found, tuple | list) else (found,):
                if isinstance(one, torch.Tensor):
                    self.largest = max(self.largest, one.numel() * one.element_size())
            return found

    query, key = torch.randn(2, 1, 10, 4096, 8)
    method: TokenMethod = gp.ZeroTPrune()
    with Sizes() as sizes:
        choice = method.choose(query, key, 2048, VIEW)
    assert choice.kept.shape == (1, 2048) and choice.target.shape == (1, 4096)
    one_map = 10 * 4096**2 * 4
    assert sizes.largest < one_map / 8
