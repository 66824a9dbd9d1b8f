"""Losses and assignment of a router training against naive references, and the law of each."""

from __future__ import annotations

import math

import pytest
import tiny_hosts
import torch

from genprune.recovery.draws import min_snr_weight
from genprune.routers import relaxation
from genprune.routers.architecture import ArchitectureSpace
from genprune.routers.assignment import balancing_bias, by_noise_level, cluster_codes
from genprune.routers.losses import commitment_loss, contrastive_loss, resource_loss, spread_terms
from genprune.routers.sinkhorn import sinkhorn_assignment


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(values, dim=-1)


def test_contrastive_loss_is_the_papers_formula():
    features, embeddings, tau = unit(4, 6), unit(4, 3, seed=1) * 5, 0.3

    def softmax_row(vectors, i):
        scores = [float(vectors[i] @ vectors[j] / (vectors[i].norm() * vectors[j].norm())) / tau for j in range(4)]
        total = sum(math.exp(score) for score in scores)
        return [math.exp(score) / total for score in scores]

    terms = []
    for i in range(4):
        for p, q in zip(softmax_row(features, i), softmax_row(embeddings, i)):
            terms.append(-(q * math.log(p) + (1 - q) * math.log(1 - p)))
    assert float(contrastive_loss(features, embeddings, tau)) == pytest.approx(sum(terms) / 16)


def test_contrastive_loss_is_least_where_codes_lie_as_prompts_do():
    embeddings = unit(8, 5)
    same = contrastive_loss(embeddings, embeddings, 0.1)
    other = contrastive_loss(
        embeddings[torch.randperm(8, generator=torch.Generator().manual_seed(0))], embeddings, 0.1
    )
    assert same < other


@pytest.mark.parametrize("form", ["log", "absolute", "squared"])
def test_resource_loss_is_of_the_mean(form):
    kept = torch.tensor([0.2, 0.8])
    assert float(resource_loss(kept, 0.5, form)) == pytest.approx(0, abs=1e-6)
    wanted = {"log": abs(math.log(0.5 / 0.4)), "absolute": 0.1, "squared": 0.01}[form]
    assert float(resource_loss(kept, 0.4, form)) == pytest.approx(wanted, rel=1e-5)


def test_spread_terms():
    spread, largest = spread_terms(torch.tensor([0.2, 0.4, 0.9]))
    assert float(spread) == pytest.approx(-torch.tensor([0.2, 0.4, 0.9]).std(unbiased=False).item())
    assert float(largest) == pytest.approx(0.1)
    assert float(spread_terms(torch.tensor([0.5]))[0]) == 0


def test_commitment_moves_prompts_and_not_codes():
    prompts, codes = unit(3, 4).requires_grad_(), unit(3, 4, seed=2).requires_grad_()
    commitment_loss(prompts, codes).backward()
    assert prompts.grad.abs().sum() > 0 and codes.grad is None


def test_sinkhorn_balances_what_argmax_does_not():
    generator = torch.Generator().manual_seed(0)
    similarity = 0.05 * torch.rand((64, 4), generator=generator)
    similarity[:, 0] += 0.3  # every prompt likes code 0 best
    assert set(similarity.argmax(1).tolist()) == {0}
    counts = torch.bincount(sinkhorn_assignment(similarity, iterations=50), minlength=4)
    assert counts.min() >= 8
    one = sinkhorn_assignment(similarity[:1])
    assert one.shape == (1,)


def test_sinkhorn_is_the_naive_iteration():
    similarity, epsilon = torch.rand((5, 3), generator=torch.Generator().manual_seed(1)), 0.2
    transport = [[math.exp(float(similarity[b, k]) / epsilon) for b in range(5)] for k in range(3)]
    for _ in range(3):
        transport = [[value / sum(row) / 3 for value in row] for row in transport]
        sums = [sum(transport[k][b] for k in range(3)) for b in range(5)]
        transport = [[transport[k][b] / sums[b] / 5 for b in range(5)] for k in range(3)]
    wanted = [max(range(3), key=lambda k: transport[k][b]) for b in range(5)]
    assert sinkhorn_assignment(similarity, epsilon).tolist() == wanted


def test_sinkhorn_survives_small_epsilon():
    assignment = sinkhorn_assignment(torch.eye(4), epsilon=1e-3)
    assert assignment.tolist() == [0, 1, 2, 3]


def test_noise_levels_fall_into_their_interval():
    assert by_noise_level([0.1, 0.3, 0.9], (0.25, 0.5)).tolist() == [0, 1, 2]
    assert by_noise_level([0.25, 0.5], (0.25, 0.5)).tolist() == [1, 2]  # as TimestepRouter.expert_at
    assert by_noise_level([0.1, 0.9], ()).tolist() == [0, 0]


def test_min_snr_of_v_prediction_vanishes_with_the_signal():
    """The release has min(SNR + 1, gamma) / (SNR + 1), which is 1 there."""
    assert float(min_snr_weight(torch.tensor(1e-6, dtype=torch.float64), "v_prediction", 5.0)) < 1e-5
    high = torch.tensor(0.999, dtype=torch.float64)
    snr = float(high / (1 - high))
    assert float(min_snr_weight(high, "v_prediction", 5.0)) == pytest.approx(5 / (snr + 1))


def test_the_bias_gives_every_code_its_share():
    generator = torch.Generator().manual_seed(0)
    similarity = 0.05 * torch.rand((200, 4), generator=generator).double()
    similarity[:, 0] += 0.02
    weights = torch.randint(1, 4, (200,), generator=generator)
    before = torch.bincount(similarity.argmax(1), weights.double(), minlength=4) / weights.sum()
    bias = balancing_bias(similarity, weights)
    after = torch.bincount((similarity + bias).argmax(1), weights.double(), minlength=4) / weights.sum()
    assert before.max() > 0.45 and after.min() > 0.2 and after.max() < 0.3
    assert float(bias.sum()) == pytest.approx(0, abs=1e-12)
    assert balancing_bias(similarity[:, :1], weights).tolist() == [0.0]


def test_codes_begin_in_the_midst_of_clusters():
    space = ArchitectureSpace.of(tiny_hosts.flux(), depth=False)
    generator = torch.Generator().manual_seed(0)
    middles = relaxation.threshold(3.0) + torch.randn((3, space.length), generator=generator)
    noise = 0.1 * torch.randn((3, 10, space.length), generator=generator)
    codes = cluster_codes(space, (middles[:, None] + noise).flatten(0, 1), 3)
    nearest = torch.cdist(codes, middles).argmin(1)
    assert sorted(nearest.tolist()) == [0, 1, 2]
    assert (codes - middles[nearest]).abs().mean() < 0.05
