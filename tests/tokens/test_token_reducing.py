"""Dropping, merging and restoring against loops, and their gradients."""

from __future__ import annotations

import pytest
import torch

from genprune.errors import GenpruneError
from genprune.tokens.choice import Choice
from genprune.tokens.matching import best_match, complement, nearest_kept, unit_keys
from genprune.tokens.reducing import compose, gather_tokens, reduce_tokens, restore_tokens

KEPT = torch.tensor([[0, 2, 5], [1, 3, 4]])
TARGET = torch.tensor([[0, 0, 1, 1, 1, 2], [2, 0, 0, 1, 2, 1]])


def hidden(prefix=1, dtype=torch.float64):
    return torch.randn(2, prefix + 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("how", ["drop", "merge", "mlerp"])
def test_each_reduction_is_that_of_a_loop(how, prefix):
    x, size = hidden(prefix), torch.tensor([[1.0, 2, 1, 3, 1, 1], [2, 1, 1, 1, 4, 1]]).double()
    shorter, sizes = reduce_tokens(x, Choice(KEPT, TARGET), prefix, how, size)
    assert torch.equal(shorter[:, :prefix], x[:, :prefix])
    for row in range(2):
        for position in range(3):
            group = [i for i in range(6) if TARGET[row, i] == position]
            tokens, weight = x[row, prefix:][group], size[row, group]
            mean = (tokens * weight[:, None]).sum(0) / weight.sum()
            expected = {
                "drop": x[row, prefix + KEPT[row, position]],
                "merge": mean,
                "mlerp": mean / mean.norm() * max(t.norm() for t in tokens),
            }[how]
            assert torch.allclose(shorter[row, prefix + position], expected)
            assert sizes[row, position] == (size[row, KEPT[row, position]] if how == "drop" else weight.sum())


def test_merging_twice_keeps_the_weighted_mean_of_all():
    x = hidden(0)
    once, size = reduce_tokens(x, Choice(KEPT, TARGET), 0, "merge")
    inner = Choice(torch.tensor([[1, 2], [0, 2]]), torch.tensor([[0, 0, 1], [0, 1, 1]]))
    twice, size = reduce_tokens(once, inner, 0, "merge", size)
    assert torch.equal(size.sum(1), torch.full((2,), 6.0).double())
    pooled = (twice * size[..., None]).sum(1) / size.sum(1, keepdim=True)
    assert torch.allclose(pooled, x.mean(1)) and not torch.allclose(twice.mean(1), x.mean(1))


def test_duplicates_merged_pool_to_the_same_vector():
    x = torch.tensor([[[1.0, 0], [1, 0], [1, 0], [0, 1]]])
    merged, size = reduce_tokens(x, Choice(torch.tensor([[0, 3]]), torch.tensor([[0, 0, 0, 1]])), 0, "merge")
    assert torch.equal(merged[0], x[0, [0, 3]]) and size.tolist() == [[3, 1]]


@pytest.mark.parametrize("how", ["drop", "merge", "mlerp"])
def test_gradients_flow_into_the_tokens(how):
    x = hidden().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reduce_tokens(x, Choice(KEPT, TARGET), 1, how)[0], (x,))
    x.grad = None
    reduce_tokens(x, Choice(KEPT, TARGET), 1, how)[0].sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).sum() == (4 if how == "drop" else 7)


def test_half_precision_stays_and_keeping_all_changes_nothing():
    x = hidden(dtype=torch.bfloat16)
    assert reduce_tokens(x, Choice(KEPT, TARGET), 1, "merge")[0].dtype == torch.bfloat16
    everything = Choice(torch.arange(6).expand(2, 6))
    assert reduce_tokens(x, everything, 1, "merge")[0] is x


@pytest.mark.parametrize("how", ["nearest", "own", "zeros"])
def test_every_kept_token_comes_back_to_its_origin(how):
    x = hidden(2)
    shorter = gather_tokens(x, KEPT, 2)
    full = restore_tokens(shorter, KEPT, 6, 2, how, target=TARGET, own=x[:, 2:])
    expected = {
        "own": x[:, 2:],
        "zeros": torch.zeros(2, 6, 4).double().scatter(1, KEPT[..., None].expand(-1, -1, 4), shorter[:, 2:]),
        "nearest": torch.stack([shorter[row, 2:][TARGET[row]] for row in range(2)]),
    }[how]
    assert torch.equal(full, torch.cat([x[:, :2], expected], dim=1))
    assert torch.equal(gather_tokens(full, KEPT, 2), shorter)


def test_composed_origins_survive_two_reductions():
    x = hidden(0)
    inner = torch.tensor([[0, 2], [1, 2]])
    origins = compose(KEPT, inner)
    assert origins.tolist() == [[0, 5], [3, 4]]
    shorter = gather_tokens(gather_tokens(x, KEPT, 0), inner, 0)
    assert torch.equal(restore_tokens(shorter, origins, 6, 0, "own", own=x), x)


def test_what_is_missing_is_said():
    x = hidden()
    with pytest.raises(GenpruneError, match="without target; expected.*wants_target=True"):
        reduce_tokens(x, Choice(KEPT), 1, "merge")
    with pytest.raises(GenpruneError, match="reduce='mean'.*expected one of drop, merge, mlerp"):
        reduce_tokens(x, Choice(KEPT), 1, "mean")
    with pytest.raises(GenpruneError, match="restore='own' got no own; expected.*Pass own="):
        restore_tokens(x[:, :4], KEPT, 6, 1)


def test_the_nearest_kept_token_is_that_of_a_loop():
    metric = unit_keys(torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0)), "concat")
    target = nearest_kept(metric, KEPT)
    for row in range(2):
        for i in range(6):
            best = max(range(3), key=lambda j: float(metric[row, i] @ metric[row, KEPT[row, j]]))
            assert target[row, i] == best  # a kept one is most like itself
    assert complement(KEPT, 6).tolist() == [[1, 3, 4], [0, 2, 5]]
    shut = torch.tensor([[True, False, True]] * 2)
    assert (best_match(metric, metric[:, :3], shut)[1] == 1).all()
