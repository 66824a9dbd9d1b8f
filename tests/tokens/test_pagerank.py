"""Zero-TPrune's stages against a dense float64 reference, and the laws of the ranking."""

from __future__ import annotations

import math

import pytest
import torch

from genprune.tokens.choice import LayerView
from genprune.tokens.matching import unit_keys
from genprune.tokens.methods import ZeroTPrune
from genprune.tokens.pagerank import combine_heads, head_filter, page_rank, redundant, start_scores, steps_at
from genprune.tokens.pagerank import vote_weights as votes_of

SCALE = 0.3  # not d ** -0.5, so that a scale taken from the width would show


def queries(batch=2, heads=3, tokens=24, width=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(batch, heads, tokens, width, generator=generator, dtype=torch.float64) for _ in "qk"]


def rank(q, k, steps, class_weighted=False):
    alive = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool)
    return page_rank(votes_of(q, k, SCALE), steps, start_scores(alive, class_weighted, torch.float64), alive)


# The reference: one image at a time, one head at a time, on the survivors' own sub-matrix.


def reference_scores(q, k, living, steps, class_weighted, bias=None, temperature=1.0):
    """(H, len(living)) scores of mean 1 among the tokens `living`."""
    rows = []
    for head in range(q.shape[0]):
        logits = SCALE * q[head][living] @ k[head][living].T
        if bias is not None:
            logits = logits + bias[head][living][:, living]
        attention = torch.softmax(logits / temperature, dim=-1)
        s = torch.ones(len(living), dtype=torch.float64)
        if class_weighted:
            s[0] = math.sqrt(len(living))
        s = s / s.mean()
        for _ in range(steps):
            s = torch.stack([sum(attention[i, j] * s[i] for i in range(len(living))) for j in range(len(living))])
        rows.append(s)
    return torch.stack(rows)


def reference_importance(scores, prefix, heads, bounds):
    stays = list(range(len(scores)))
    if bounds is not None:
        variance = [float(((s[prefix:] - s[prefix:].mean()) ** 2).mean()) for s in scores]
        stays = [h for h in stays if bounds[0] <= variance[h] <= bounds[1]] or stays
    chosen = scores[stays][:, prefix:]
    return (chosen**2).mean(0).sqrt() if heads == "rms" else chosen.mean(0)


def reference_choice(q, k, keep, prefix, method, steps, class_weighted, bias=None, padding=()):
    """Kept patches of one image; q, k of shape (H, N, d)."""
    patches = q.shape[1] - prefix
    living = [i for i in range(q.shape[1]) if i - prefix not in padding]
    gone = min(round(method.similarity_share * (patches - keep)), patches // 2)
    if gone:
        scores = reference_scores(q, k, living, 1, class_weighted, bias, method.temperature)
        value = dict(zip(living[prefix:], reference_importance(scores, prefix, method.heads, method.head_filter)))
        order = sorted(range(prefix, q.shape[1]), key=lambda i: float(value.get(i, -math.inf)))
        if method.split == "alternate":
            dead, alive = [i for i in order if i not in value], [i for i in order if i in value]
            turns = [(i, r % 2) for r, i in enumerate(order) if i in alive]
            order = [*dead, *(i for i, turn in turns if turn == 0), *(i for i, turn in turns if turn == 1)]
        low, high = order[: patches // 2], order[patches // 2 :]
        keys = k.mean(0) if method.keys == "mean" else k.transpose(0, 1).flatten(1)

        def best(i):
            if i not in value:
                return math.inf
            return max(float(torch.cosine_similarity(keys[i], keys[j], dim=0)) for j in high if j in value)

        removed = sorted(low, key=best)[-gone:]
        living = [i for i in living if i not in removed]
        pool = [i for i in range(prefix, q.shape[1]) if i not in removed]
    else:
        pool = list(range(prefix, q.shape[1]))
    scores = reference_scores(q, k, living, steps, class_weighted, bias, method.temperature)
    value = dict(zip(living[prefix:], reference_importance(scores, prefix, method.heads, method.head_filter)))
    best = sorted(pool, key=lambda i: float(value.get(i, -math.inf)))[-keep:]
    return sorted(i - prefix for i in best)


ABLATIONS = {
    "full": {},
    "no similarity": {"similarity_share": 0.0},
    "similarity alone": {"similarity_share": 1.0},
    "no head filter": {"head_filter": None},
    "tight head filter": {"head_filter": (0.2, 0.5)},
    "mean of heads": {"heads": "mean"},
    "uniform start": {"start": "uniform"},
    "one step": {"steps": 1},
    "temperature": {"temperature": 0.5},
    "keys side by side": {"keys": "concat"},
    "vote": {"score": "vote"},
    "alternate ranks": {"split": "alternate"},
    "alternate ranks alone, by a vote": {"score": "vote", "split": "alternate", "similarity_share": 1.0},
    "in blocks": {"dense_limit": 5},
}


@pytest.mark.parametrize("extras", ["plain", "bias", "padding"])
@pytest.mark.parametrize("name", ABLATIONS)
def test_the_choice_is_that_of_the_dense_reference(name, extras):
    q, k = queries()
    prefix, keep = 2, 13
    method = ZeroTPrune.published(**ABLATIONS[name])
    bias = torch.randn(3, 24, 24, dtype=torch.float64) if extras == "bias" else None
    valid, padding = None, [(), ()]
    if extras == "padding":
        valid = torch.ones(2, 22, dtype=torch.bool)
        valid[0, -3:] = False
        padding = [(19, 20, 21), ()]
    view = LayerView(prefix, True, SCALE, layer=2, depth=12, bias=None if bias is None else bias[None], valid=valid)
    kept = method.choose(q, k, keep, view).kept
    steps = 1 if method.score == "vote" else method.steps or 5
    weighted = method.score == "wpr" and method.start != "uniform"
    for row in range(2):
        expected = reference_choice(q[row], k[row], keep, prefix, method, steps, weighted, bias, padding[row])
        assert kept[row].tolist() == expected


def test_votes_are_passed_from_the_voter_to_the_voted_and_their_sum_stays():
    q, k = queries()
    for steps in (1, 2, 7):  # a row sum would shrink by N with every step
        assert torch.allclose(rank(q, k, steps).sum(-1), torch.full((2, 3), 24.0).double(), rtol=1e-12, atol=0)
    attention = torch.softmax(SCALE * q @ k.transpose(-1, -2), dim=-1)
    assert torch.allclose(rank(q, k, 1), 24 * attention.mean(-2), rtol=1e-12)


def test_scores_move_with_the_tokens():
    q, k = queries()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(rank(q[:, :, order], k[:, :, order], 3), rank(q, k, 3)[:, :, order], rtol=1e-12)


def test_the_class_start_matters_for_few_steps_and_is_forgotten_by_many():
    q, k = queries()
    difference = [(rank(q, k, steps, True) - rank(q, k, steps)).abs().max() for steps in (1, 200)]
    assert difference[0] > 0.1 and difference[1] < 1e-6
    start = start_scores(torch.ones(1, 25, dtype=torch.bool), True)
    assert start[0, 0] / start[0, 1] == 5 and torch.isclose(start.mean(), torch.tensor(1.0))


def test_the_head_filter_drops_a_head_that_votes_for_one_token():
    alive = torch.ones(1, 197, dtype=torch.bool)
    spread = 1 + 0.5 * torch.sin(torch.arange(197.0))  # variance 0.125
    one_hot = torch.zeros(197).index_fill(0, torch.tensor([9]), 197.0)  # 196, the largest there is
    scores = torch.stack([spread, one_hot, torch.ones(197)])[None]
    weight = head_filter(scores, alive, 1, (0.01, 0.7))
    assert weight.tolist() == [[1, 0, 0]]
    assert torch.allclose(combine_heads(scores, "rms", weight), spread[None])


def test_when_no_head_passes_all_do():
    scores = torch.ones(2, 4, 30)  # no variance at all
    alive = torch.ones(2, 30, dtype=torch.bool)
    assert head_filter(scores, alive, 1, (0.01, 0.7)).tolist() == [[1] * 4] * 2
    q, k = queries()
    view = LayerView(1, True, SCALE, 2, 12)
    nobody = ZeroTPrune.published(score="wpr", head_filter=(100.0, 101.0)).choose(q, k, 12, view)
    assert torch.equal(nobody.kept, ZeroTPrune.published(score="wpr", head_filter=None).choose(q, k, 12, view).kept)


def test_head_filter_acts_on_mean_one_scores_of_real_size():
    q, k = (torch.randn(1, 6, 197, 64, generator=torch.Generator().manual_seed(0)) for _ in "qk")
    alive = torch.ones(1, 197, dtype=torch.bool)
    scores = page_rank(votes_of(q, k, 0.125), 1, start_scores(alive, False), alive)
    variance = scores.var(-1, unbiased=False)  # with sum-1 scores at most 0.00505
    assert ((variance > 0.01) & (variance < 0.7)).any() and torch.allclose(scores.mean(-1), torch.ones(1, 6))


def test_a_token_vital_in_one_head_beats_one_mediocre_in_all():
    scores = torch.tensor([[[2.8, 1.0], [0.0, 1.0], [0.0, 1.0]]])
    assert combine_heads(scores, "rms").argmax() == 0 and combine_heads(scores, "mean").argmax() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("score", ["wpr", "vote", "cls", "landmark"])
@pytest.mark.parametrize("dense_limit", [600, 0])
def test_logits_of_a_hundred_at_temperature_a_tenth_stay_finite(dtype, score, dense_limit):
    q, k = (torch.randn(2, 3, 24, 8, generator=torch.Generator().manual_seed(0)) for _ in "qk")
    logits = (q @ k.transpose(-1, -2)).abs().max()
    q = (q * (100 / logits)).to(dtype)  # exp(100 / 0.1) overflows every type
    alive = torch.ones(2, 24, dtype=torch.bool)
    alive[:, 5:9] = False
    weights = votes_of(q, k.to(dtype), 1.0, temperature=0.1)
    scores = page_rank(weights, 3, start_scores(alive, True), alive)
    assert weights.dtype == torch.float32 and scores.isfinite().all()
    method = ZeroTPrune.published(score=score, temperature=0.1, dense_limit=dense_limit)
    kept = method.choose(q, k.to(dtype), 11, LayerView(1, True, 1.0, 2, 12)).kept
    assert kept.shape == (2, 11) and (kept.diff(dim=1) > 0).all() and kept.min() >= 0 and kept.max() < 23


def test_a_voter_for_removed_tokens_alone_gives_no_nan():
    q = torch.zeros(1, 1, 4, 2)
    k = torch.zeros(1, 1, 4, 2)
    q[..., 0, 0] = 1
    k[..., 3, 0] = 1000.0  # token 0 looks at token 3 only, by 1000 nats
    alive = torch.tensor([[True, True, True, False]])
    scores = page_rank(votes_of(q, k, 1.0), 2, start_scores(alive, False), alive)
    assert scores.isfinite().all() and scores[0, 0, 3] == 0


def test_the_redundant_come_from_the_less_important_half():
    metric = torch.tensor([[[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]]])
    metric = metric / metric.norm(dim=-1, keepdim=True)
    importance = torch.tensor([[5.0, 1.0, 4.0, 2.0, 3.0]])  # A = {1, 3}, B = {4, 2, 0}
    alive = torch.ones(1, 5, dtype=torch.bool)
    assert redundant(metric, importance, 1, alive).tolist() == [[1]]  # 1 resembles 0
    assert sorted(redundant(metric, importance, 2, alive)[0].tolist()) == [1, 3]


def test_prefix_tokens_vote_and_are_never_candidates():
    q, k = queries(tokens=21)
    view = LayerView(5, True, SCALE, 2, 12)  # a class token and four registers
    before = ZeroTPrune.published(score="wpr").choose(q, k, 7, view).kept
    assert before.max() < 16
    q[:, :, 1:5] *= 9  # the registers' queries alone
    assert not torch.equal(ZeroTPrune.published(score="wpr").choose(q, k, 7, view).kept, before)


def test_without_a_class_token_the_start_is_uniform():
    q, k = queries()
    view = LayerView(0, False, SCALE, 2, 12)
    uniform = ZeroTPrune.published(score="wpr", start="uniform", steps=1).choose(q, k, 9, view)
    assert torch.equal(ZeroTPrune.published(score="wpr", steps=1).choose(q, k, 9, view).kept, uniform.kept)


def test_steps_by_depth():
    assert [steps_at((5, 4, 1), layer, 12) for layer in range(12)] == [5] * 3 + [4] * 6 + [1] * 3
    assert steps_at(7, 11, 12) == 7


def test_float32_and_autocast_choose_as_float64():
    q, k = queries()
    view = LayerView(1, True, SCALE, 2, 12)
    method = ZeroTPrune.published(score="wpr")
    expected = method.choose(q, k, 12, view).kept
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(method.choose(q.float(), k.float(), 12, view).kept, expected)
    assert unit_keys(k.bfloat16()).dtype == torch.float32
