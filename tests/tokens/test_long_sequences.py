"""Scores without the N x N map: equal to the map's where they claim to be, and small."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from genprune.errors import GenpruneError
from genprune.tokens import long_sequences
from genprune.tokens.choice import LayerView
from genprune.tokens.long_sequences import BlockedGraph, class_graph, landmark_graph, random_scores
from genprune.tokens.methods import ZeroTPrune
from genprune.tokens.pagerank import DenseGraph, vote_weights


def queries(tokens, heads=2, width=8, batch=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, tokens, width, generator=generator, dtype=dtype) for _ in "qk"]


@pytest.mark.parametrize("biased", [False, True])
def test_blocks_of_voters_give_the_scores_of_the_map(biased, monkeypatch):
    monkeypatch.setattr(long_sequences, "BLOCK", 7)
    q, k = queries(24, batch=2)
    bias = torch.randn(1, 2, 24, 24, dtype=torch.float64) if biased else torch.randn(2, 1, 1, 24, dtype=torch.float64)
    alive = torch.ones(2, 24, dtype=torch.bool)
    alive[0, 3:8] = False
    blocked, dense = BlockedGraph(q, k, 0.3, bias, 0.7), DenseGraph(vote_weights(q, k, 0.3, bias, 0.7))
    for steps in (1, 3):
        assert torch.allclose(blocked.scores(alive, True, steps), dense.scores(alive, True, steps), rtol=1e-10)


def test_as_many_landmarks_as_patches_are_the_vote_of_all():
    q, k = queries(26)
    alive = torch.ones(1, 26, dtype=torch.bool)
    for removed in (None, 9):
        if removed:
            alive[:, removed] = False
        landmarks = landmark_graph(q, k, 99, 1, True, 0.3).scores(alive, True, 1)
        assert torch.allclose(landmarks, DenseGraph(vote_weights(q, k, 0.3)).scores(alive, True, 1), rtol=1e-6)


def test_landmarks_are_spread_evenly_and_keep_the_sum():
    q, k = queries(2 + 40)
    graph = landmark_graph(q, k, 4, 2, True, 0.3)
    assert graph.voters.tolist() == [0, 1, 7, 17, 27, 37]
    alive = torch.ones(1, 42, dtype=torch.bool)
    alive[:, [7, 8]] = False  # a landmark goes as well
    assert torch.allclose(graph.scores(alive, False, 1).sum(-1), torch.tensor(40.0).double())
    assert landmark_graph(q, k, 4, 2, False, 0.3).voters.tolist() == [7, 17, 27, 37]


def test_when_every_landmark_was_removed_all_of_them_vote():
    q, k = queries(20)
    alive = torch.ones(1, 20, dtype=torch.bool)
    alive[:, 10] = False
    assert landmark_graph(q, k, 1, 0, False, 0.3).scores(alive, False, 1).sum() == pytest.approx(2 * 19)


def test_the_class_score_is_the_class_tokens_row():
    q, k = queries(20)
    alive = torch.ones(1, 20, dtype=torch.bool)
    row = torch.softmax(0.3 * q @ k.transpose(-1, -2), -1)[:, :, 0]
    assert torch.allclose(class_graph(q, k, 0.3).scores(alive, False, 1), 20 * row)
    with pytest.raises(GenpruneError, match="score='cls'.*has none; expected.*Pass score='vote'"):
        ZeroTPrune.published(score="cls").choose(q, k, 5, LayerView(0, False, 0.3))


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned (views too)."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else [out]:
            if isinstance(item, torch.Tensor):
                self.largest = max(self.largest, item.numel())
        return out


@pytest.mark.parametrize("score", ["vote", "cls", "landmark", "random"])
def test_no_map_of_4096_tokens(score):
    q, k = queries(4096, dtype=torch.float32)
    with LargestTensor() as seen:
        kept = ZeroTPrune.published(score=score, similarity_share=0.5, reduce="merge").choose(
            q, k, 2048, LayerView(1, True, 0.3)
        )
    assert kept.kept.shape == (1, 2048)
    assert seen.largest <= 4096 * 4096 * 2 // 8  # of the two heads' maps


def test_a_dense_map_is_seen_by_that_measure():
    q, k = queries(4096, heads=1, dtype=torch.float32)
    with LargestTensor() as seen:
        ZeroTPrune.published(score="vote", dense_limit=4096).choose(q, k, 2048, LayerView(1, True, 0.3))
    assert seen.largest == 4096 * 4096


def test_random_scores_depend_on_seed_layer_and_row_alone():
    def draw(seed, layer, rows=3):
        return random_scores(rows, 500, seed, layer, torch.device("cpu"))

    first = draw(0, 2)
    assert torch.equal(first, draw(0, 2)) and torch.equal(first[:2], draw(0, 2, rows=2))
    for other in (draw(1, 2), draw(0, 3), first.roll(1, 0)):
        rank_correlation = torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]
        assert abs(rank_correlation) < 0.1  # 1,500 pairs: three deviations are 0.08
    assert first.mean() / 2**24 == pytest.approx(0.5, abs=0.03)
    before = torch.get_rng_state()
    method, (q, k) = ZeroTPrune.published(score="random", seed=3), queries(50)
    kept = [method.choose(q, k, 20, LayerView(1, True, 0.3)).kept for _ in range(2)]
    assert torch.equal(*kept) and torch.equal(before, torch.get_rng_state())
