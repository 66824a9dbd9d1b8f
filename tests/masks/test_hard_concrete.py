"""The hard concrete gate against float64 formulas and Monte Carlo."""

from __future__ import annotations

import math

import pytest
import torch

from genprune.errors import GenpruneError
from genprune.masks import HardConcrete

LOGITS = torch.tensor([-4.0, -2.0, -0.7, 0.0, 0.4, 1.0, 2.5, 4.0])
DAMPINGS = [0.1, 0.5, 1.0, 1e-6]


def reference_gate(logit: float, u: float, damping: float, temperature=0.83, low=-0.1, high=1.1) -> float:
    noise = math.log(u + damping) - math.log(1 - u + damping)
    s = 1 / (1 + math.exp(-(noise + logit) / temperature))
    return min(1.0, max(0.0, s * (high - low) + low))


@pytest.mark.parametrize("damping", DAMPINGS)
def test_the_gate_is_the_formula(damping):
    relaxation = HardConcrete(damping=damping)
    uniform = torch.linspace(0.01, 0.99, 25)
    found = relaxation.gate(LOGITS[:, None].expand(-1, 25), uniform.expand(len(LOGITS), -1))
    expected = [[reference_gate(float(l), float(u), damping) for u in uniform] for l in LOGITS]
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.double), rtol=0, atol=1e-6)


@pytest.mark.parametrize("level", [0.0, 0.5])
@pytest.mark.parametrize("damping", DAMPINGS)
def test_the_probability_is_that_of_many_draws(damping, level):
    relaxation = HardConcrete(damping=damping)
    # 400,000 draws: three standard deviations of a share are 2.4e-3
    uniform = torch.rand(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    for logit in LOGITS.double():
        drawn = (relaxation.gate(logit, uniform) > level).double().mean()
        assert float(relaxation.probability(logit, level)) == pytest.approx(float(drawn), abs=3e-3)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_the_probability_is_the_published_closed_form(damping):
    """`1 - clip((c (1 + d) - d) / (1 + c), 0, 1)` with `c = (-g / z)^a e^-l`."""
    found = HardConcrete(damping=damping).probability(LOGITS.double())
    for logit, value in zip(LOGITS.tolist(), found.tolist()):
        c = (0.1 / 1.1) ** 0.83 * math.exp(-logit)
        assert value == pytest.approx(1 - min(1, max(0, (c * (1 + damping) - damping) / (1 + c))), abs=1e-12)


def test_undamped_noise_gives_the_sigmoid_form():
    relaxation = HardConcrete(damping=1e-6)
    for level, shift in ((0.0, 0.83 * math.log(0.1 / 1.1)), (0.5, 0.0)):
        expected = torch.sigmoid(LOGITS - shift)
        torch.testing.assert_close(relaxation.smooth_probability(LOGITS, level), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(relaxation.probability(LOGITS, level), expected, rtol=0, atol=1e-5)


def test_far_logits_have_finite_probabilities_and_gradients():
    logits = torch.tensor([-1e4, -100.0, 100.0, 1e4], requires_grad=True)
    for damping in DAMPINGS:
        relaxation = HardConcrete(damping=damping)
        for function in (relaxation.probability, relaxation.smooth_probability, relaxation.expected_gate):
            values = function(logits)
            assert torch.allclose(values, torch.tensor([0.0, 0.0, 1.0, 1.0]))
            (gradient,) = torch.autograd.grad(values.sum(), logits)
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("damping", "zone"), [(0.1, 4.39), (0.5, 3.09), (1.0, 2.68)])
def test_gates_are_constant_in_the_dead_zone_and_nowhere_else(damping, zone):
    relaxation = HardConcrete(damping=damping)
    assert relaxation.dead_zone == pytest.approx(zone, abs=0.01)
    uniform = torch.linspace(0, 1 - 1e-6, 2001)

    def gates(logit: float):
        leaf = torch.full_like(uniform, logit).requires_grad_()
        value = relaxation.gate(leaf, uniform)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    for sign, constant in ((1, 1.0), (-1, 0.0)):
        value, gradient = gates(sign * (relaxation.dead_zone + 1e-3))
        assert bool((value == constant).all()) and not gradient.any()
        value, gradient = gates(sign * (relaxation.dead_zone - 0.05))
        assert bool((value != constant).any()) and gradient.any()


def test_the_true_l0_has_no_gradient_where_the_noise_cannot_close_the_gate():
    for damping, known in ((0.1, 0.41), (0.5, -0.89), (1.0, -1.30)):
        edge = 0.83 * math.log(0.1 / 1.1) + math.log((1 + damping) / damping)
        assert edge == pytest.approx(known, abs=0.01)
        logits = torch.tensor([edge - 0.01, edge + 0.01], requires_grad=True)
        (gradient,) = torch.autograd.grad(HardConcrete(damping=damping).probability(logits).sum(), logits)
        assert gradient[0] > 0 and gradient[1] == 0


def test_the_expected_gate_is_the_mean_of_many_draws():
    for damping in DAMPINGS:
        relaxation = HardConcrete(damping=damping)
        uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(1), dtype=torch.double)
        drawn = torch.stack([relaxation.gate(logit, uniform).mean() for logit in LOGITS.double()])
        # 64 midpoints resolve the slope of the damped noise to 1e-3; 3 standard errors of the mean are 3e-3
        torch.testing.assert_close(relaxation.expected_gate(LOGITS.double()), drawn, rtol=0, atol=4e-3)
    # the published figures at the start
    for logit, damping, mean in ((3.0, 0.5, 1.0), (3.0, 0.1, 0.978), (2.5, 0.5, 0.990)):
        assert float(HardConcrete(damping=damping).expected_gate(torch.tensor(logit))) == pytest.approx(mean, abs=2e-3)


@pytest.mark.parametrize("wrong", [{"temperature": 0}, {"damping": 0}, {"low": 0.0}, {"high": 1.0}])
def test_ranges_are_checked(wrong):
    with pytest.raises(GenpruneError, match="expected temperature > 0, damping > 0, low < 0 and high > 1"):
        HardConcrete(**wrong)
