"""Configs of token methods: checks, JSON, published counts, and `choose` compiled."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch

from genprune.errors import GenpruneError, PlanMismatch
from genprune.tokens.choice import LayerView
from genprune.tokens.matching import unit_keys
from genprune.tokens.methods import TokenMethod, ToMe, ZeroTPrune

METHODS = [
    ZeroTPrune(),
    ZeroTPrune(keep={6: 0.7, 3: 120, 8: 1.0}, score="wpr", steps=(9, 5, 1), head_filter=None, keys="concat"),
    ZeroTPrune(of="latency", layers=(2, 5), reduce="mlerp", placement="before_mlp", restore="nearest"),
    ToMe(r=13),
    ToMe(keep=0.5, reduce="drop", proportional=False),
]


def queries(batch=2, tokens=30):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 3, tokens, 8, generator=generator) for _ in "qk"]


@pytest.mark.parametrize("method", METHODS)
def test_json_pickle_and_files_give_the_same_method(method, tmp_path):
    method.save(tmp_path / "method.json")
    text = json.dumps(method.to_json())
    for again in (
        TokenMethod.load(tmp_path / "method.json"),
        TokenMethod.from_json(text),
        type(method).from_json(method.to_json()),
        pickle.loads(pickle.dumps(method)),
        copy.deepcopy(method),
    ):
        assert again == method and type(again) is type(method)
        if isinstance(method.keep, dict):  # 1.0 is all patches, 1 would be one of them
            assert {layer: type(value) for layer, value in again.keep.items()} == {3: int, 6: float, 8: float}


def test_files_that_are_no_method_say_what_was_expected(tmp_path):
    with pytest.raises(PlanMismatch, match="cannot be read.*expected the JSON.*Check the path"):
        TokenMethod.load(tmp_path / "none.json")
    good = ZeroTPrune().to_json()
    for change, message in (
        ({"format_version": 2}, "format 2, this genprune reads up to 1. Upgrade"),
        ({"method": "zero_tprun"}, "nearest name: 'zero_tprune'; expected one of zero_tprune, tome"),
        ({"scores": "wpr"}, "no 'scores', nearest name: 'score'"),
        ({"keep": {"three": 0.5}}, "layer 'three' in keep; expected a whole number"),
    ):
        with pytest.raises(GenpruneError, match=message):
            TokenMethod.from_json({**good, **change})
    with pytest.raises(GenpruneError, match="no token method in JSON"):
        TokenMethod.from_json("[1]")
    with pytest.raises(GenpruneError, match="'zero_tprune'.*expected one of tome"):
        ToMe.from_json(good)


@pytest.mark.parametrize(
    "setting",
    [
        {"keep": 0}, {"keep": 1.5}, {"keep": {}}, {"keep": {3: 1.2}}, {"keep": {3: 0}}, {"keep": {-1: 0.5}},
        {"keep": {3: True}}, {"of": "params"}, {"layers": (-1,)}, {"reduce": "mean"}, {"placement": "before"},
        {"restore": "last"}, {"score": "pagerank"}, {"start": "class"}, {"steps": 0}, {"steps": (1, 2)},
        {"heads": "max"}, {"head_filter": (0.7, 0.01)}, {"similarity_share": 1.1}, {"temperature": 0},
        {"keys": "values"}, {"landmarks": 0}, {"dense_limit": -1}, {"seed": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_out_of_range_is_refused_with_three_parts(setting):
    with pytest.raises(GenpruneError, match=next(iter(setting)) + "=.*(expected|names no).*Pass"):
        ZeroTPrune(**setting)


def test_published_counts_of_tome():
    assert [1 + n for n in ToMe(r=13).counts(196, 12)] == [184, 171, 158, 145, 132, 119, 106, 93, 80, 67, 54, 41]
    assert [1 + n for n in ToMe(r=16).counts(196, 12)] == [181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11]
    assert ToMe(r=8).counts(196, 24)[-2:] == (12, 6)  # at most half of what is left
    with pytest.raises(GenpruneError, match="no r; expected ToMe"):
        ToMe().counts(196, 12)
    with pytest.raises(GenpruneError, match="both say"):
        ToMe(r=13, keep=0.5)
    assert ToMe(r=13).changed(keep=0.5) == ToMe(keep=0.5) and ToMe(keep=0.5).changed(r=3) == ToMe(r=3)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_tome_merges_the_most_similar_pairs_and_no_prefix(prefix):
    q, k = queries(tokens=24 + prefix)
    r = 7
    choice = ToMe().choose(q, k, 24 - r, LayerView(prefix, prefix > 0, 0.3))
    metric = unit_keys(k)
    for row in range(2):
        best = {}
        for i in range(0, 24 + prefix, 2):
            if i >= prefix:
                similar = {j: float(metric[row, i] @ metric[row, j]) for j in range(1, 24 + prefix, 2) if j >= prefix}
                best[i] = max(similar.items(), key=lambda item: item[1])
        gone = sorted(best, key=lambda i: -best[i][1])[:r]
        kept = [i for i in range(24) if i + prefix not in gone]
        assert choice.kept[row].tolist() == kept
        stands = [kept.index(best[i + prefix][0] - prefix) if i + prefix in gone else kept.index(i) for i in range(24)]
        assert choice.target[row].tolist() == stands


def test_tome_merges_padding_first_and_nothing_into_it():
    q, k = queries(tokens=25)
    valid = torch.ones(2, 24, dtype=torch.bool)
    valid[:, -6:] = False
    choice = ToMe().choose(q, k, 18, LayerView(1, True, 0.3, valid=valid))
    real = torch.zeros(2, 18, dtype=torch.bool).scatter(
        1, torch.arange(18).expand(2, 18), valid.gather(1, choice.kept)
    )
    assert real.gather(1, choice.target)[valid].all()
    assert (~valid).sum(1)[0] - (~real).sum(1)[0] == 3  # every second token can be merged


def test_tome_cannot_merge_more_than_half():
    q, k = queries()
    with pytest.raises(GenpruneError, match="merge 20 of 29.*at most 14.*Spread"):
        ToMe().choose(q, k, 9, LayerView(1, True, 0.3))


@pytest.mark.parametrize("method", [ZeroTPrune(), ZeroTPrune(reduce="merge"), ToMe()])
def test_keeping_all_patches_keeps_them_in_order(method):
    q, k = queries()
    choice = method.choose(q, k, 29, LayerView(1, True, 0.3))
    assert choice.kept.tolist() == [list(range(29))] * 2
    assert (choice.target is None) == (method.reduce == "drop")
    for keep in (0, 30):
        with pytest.raises(GenpruneError, match=f"{keep} patches to keep of 29; expected 1 to 29"):
            method.choose(q, k, keep, LayerView(1, True, 0.3))


@pytest.mark.parametrize("score", ["wpr", "vote", "cls", "landmark", "random"])
@pytest.mark.parametrize("reduce", ["drop", "merge"])
def test_padding_goes_first_and_shapes_do_not_depend_on_the_data(score, reduce):
    q, k = queries()
    valid = torch.ones(2, 29, dtype=torch.bool)
    valid[0, -10:] = False
    view = LayerView(1, True, 0.3, valid=valid)
    method = ZeroTPrune(score=score, reduce=reduce)
    choice = method.choose(q, k, 15, view)
    assert choice.kept.shape == (2, 15) and choice.kept[0].max() < 19 and choice.kept.dtype == torch.int64
    if reduce == "merge":
        assert torch.equal(choice.target.gather(1, choice.kept), torch.arange(15).expand(2, 15))
    k2 = k.clone()
    k2[0, :, -10:] = 50.0  # what lies in the padding does not matter
    assert torch.equal(method.choose(q, k2, 15, view).kept, choice.kept)
    assert method.choose(torch.zeros_like(q), torch.zeros_like(k), 15, view).kept.shape == (2, 15)  # all tied


def test_the_papers_settings_by_name_and_replaced():
    paper = ZeroTPrune.published(keep=0.5, steps=3)
    assert (paper.keep, paper.steps, paper.score, paper.reduce, paper.split) == (0.5, 3, "wpr", "drop", "halves")
    assert ZeroTPrune.published(reduce="merge").reduce == "merge"


def test_the_score_is_the_class_token_where_only_an_order_is_needed():
    assert ZeroTPrune().score_of(True) == "cls" and ZeroTPrune().score_of(False) == "landmark"
    assert ZeroTPrune(similarity_share=0.9).score_of(True) == "landmark"
    assert ZeroTPrune(score="wpr").score_of(True) == "wpr"


def test_auto_is_decided_by_what_the_host_can_do_and_nothing_else_changes():
    method = ZeroTPrune(keep=0.4)
    assert method.settled(merges=True, before_mlp=True) == method.changed(reduce="merge", placement="before_mlp")
    assert method.settled(merges=False, before_mlp=False) == method.changed(reduce="drop", placement="after_block")
    asked = method.changed(reduce="mlerp", placement="after_block")
    assert asked.settled(merges=True, before_mlp=True) == asked


COMPILED = [
    *(ZeroTPrune(score=score) for score in ("wpr", "vote", "cls", "landmark", "random")),
    ZeroTPrune(score="wpr", dense_limit=0, reduce="merge", keys="concat"),
    ToMe(),
]


@pytest.mark.parametrize("method", COMPILED, ids=lambda m: f"{m.name}-{getattr(m, 'score', '')}-{m.reduce}")
def test_choose_compiles_in_one_graph(method):
    torch._dynamo.reset()
    functional = method.name == "tome" or method.score == "wpr"  # changes in place made functional: slower to test
    compiled = torch.compile(method.choose, fullgraph=True, backend="aot_eager" if functional else "eager")
    for batch in (2, 4) if functional else (2,):
        q, k = queries(batch)
        view = LayerView(1, True, 0.3, 2, 12, valid=torch.ones(batch, 29, dtype=torch.bool))
        expected, found = method.choose(q, k, 18, view), compiled(q, k, 18, view)
        assert torch.equal(found.kept, expected.kept)
        assert expected.target is None or torch.equal(found.target, expected.target)


class Chooser(torch.nn.Module):
    def __init__(self, method: TokenMethod):
        super().__init__()
        self.method = method

    def forward(self, q, k):
        return self.method.choose(q, k, 18, LayerView(1, True, 0.3, 2, 12)).kept


@pytest.mark.parametrize("method", [COMPILED[0], COMPILED[4], ToMe()], ids=["wpr", "random", "tome"])
def test_choose_exports(method):
    q, k = queries()
    program = torch.export.export(Chooser(method), (q, k))
    assert torch.equal(program.module()(q, k), Chooser(method)(q, k))


def test_choose_leaves_no_gradients_and_its_inputs_alone():
    q, k = queries()
    q.requires_grad_(), k.requires_grad_()
    before = q.detach().clone(), k.detach().clone()
    bias = torch.zeros(1, 1, 1, 30)
    ZeroTPrune(score="wpr").choose(q, k, 18, LayerView(1, True, 0.3, bias=bias))
    assert torch.equal(q, before[0]) and torch.equal(k, before[1]) and not bias.any()
    assert q.grad is None


@pytest.mark.parametrize(
    "values",
    [{"layers": 3}, {"layers": ()}, {"layers": (2, 2)}, {"layers": "25"}, {"head_filter": 0.5},
     {"head_filter": ("a", "b")}, {"keep": None}],
)  # fmt: skip
def test_values_of_another_kind_are_refused_and_no_traceback(values):
    with pytest.raises(GenpruneError, match="expected .* Pass"):
        ZeroTPrune(**values)
