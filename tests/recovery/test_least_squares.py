"""The closed form: equals lstsq, cannot be improved, reconstructs what can be, survives singular matrices."""

from __future__ import annotations

import pytest
import torch

from genprune.denoising.activations import Moments
from genprune.recovery.least_squares import Residual, least_squares, mean_only


def problem(rows=300, features=7, out=3, seed=0):
    """A weight, correlated inputs with a mean, and which features stay."""
    torch.manual_seed(seed)
    make = {"dtype": torch.float64}
    inputs = torch.randn(rows, features, **make) @ torch.randn(features, features, **make) + torch.randn(features)
    return torch.randn(out, features, **make), inputs, torch.tensor([True, False, True, True, False, True, True])


def residual_of(weight, inputs, kept):
    moments = Moments.zeros(inputs.shape[1], "cpu")
    moments.add(inputs)
    return Residual.of_removed(weight, moments.second, moments.mean, kept)


def error(weight, inputs, kept, change, bias):
    """The naive mean squared output error with the update."""
    expected = inputs @ weight.T
    found = inputs[:, kept] @ (weight[:, kept] + change).T + bias
    return float((expected - found).square().sum(1).mean())


@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_lstsq(with_bias):
    weight, inputs, kept = problem()
    update = least_squares(residual_of(weight, inputs, kept), 0.0, with_bias)
    design = inputs[:, kept]
    if with_bias:
        design = torch.cat([design, torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(design, inputs @ weight.T).solution.T
    torch.testing.assert_close(weight[:, kept] + update.weight, solution[:, : int(kept.sum())], rtol=1e-6, atol=1e-8)
    if with_bias:
        torch.testing.assert_close(update.bias, solution[:, -1], rtol=1e-6, atol=1e-8)
    else:
        assert not update.bias.any()


@pytest.mark.parametrize("with_bias", [False, True])
def test_no_perturbation_lowers_the_error(with_bias):
    weight, inputs, kept = problem()
    residual = residual_of(weight, inputs, kept)
    update = least_squares(residual, 0.0, with_bias)
    best = error(weight, inputs, kept, update.weight, update.bias)
    assert best == pytest.approx(update.error, rel=1e-6)
    assert residual.energy == pytest.approx(error(weight, inputs, kept, 0, 0), rel=1e-9)
    for seed in range(20):
        torch.manual_seed(seed)
        change = update.weight + 1e-3 * torch.randn_like(update.weight)
        bias = update.bias + (1e-3 * torch.randn_like(update.bias) if with_bias else 0)
        assert error(weight, inputs, kept, change, bias) > best


def test_the_damped_update_is_the_ridge_solution_around_the_old_weights():
    weight, inputs, kept = problem()
    residual = residual_of(weight, inputs, kept)
    update = least_squares(residual, 0.1, with_bias=False)
    ridge = 0.1 * float(residual.second.diagonal().mean())
    rows = torch.cat([inputs[:, kept] / len(inputs) ** 0.5, ridge**0.5 * torch.eye(5, dtype=torch.float64)])
    wanted = torch.cat([inputs[:, ~kept] @ weight[:, ~kept].T / len(inputs) ** 0.5, torch.zeros(5, 3)])
    torch.testing.assert_close(update.weight, torch.linalg.lstsq(rows, wanted).solution.T, rtol=1e-6, atol=1e-8)
    assert error(weight, inputs, kept, update.weight, 0) == pytest.approx(update.error, rel=1e-6)
    strong = least_squares(residual, 1e9, with_bias=False)
    assert strong.weight.abs().max() < 1e-6


def test_a_combination_of_what_stays_is_reconstructed_exactly():
    weight, inputs, kept = problem()
    mix = torch.randn(int(kept.sum()), int((~kept).sum()), dtype=torch.float64)
    inputs[:, ~kept] = inputs[:, kept] @ mix + 0.7  # an affine one: the bias takes the constant
    update = least_squares(residual_of(weight, inputs, kept), 0.0, with_bias=True)
    assert error(weight, inputs, kept, update.weight, update.bias) < 1e-12 * error(weight, inputs, kept, 0, 0)


def test_the_mean_is_what_a_bias_can_take_over():
    weight, inputs, kept = problem()
    update = mean_only(residual_of(weight, inputs, kept))
    torch.testing.assert_close(update.bias, weight[:, ~kept] @ inputs[:, ~kept].mean(0))
    assert error(weight, inputs, kept, update.weight, update.bias) == pytest.approx(update.error, rel=1e-9)
    expected, found = inputs @ weight.T, inputs[:, kept] @ weight[:, kept].T + update.bias
    torch.testing.assert_close(expected.mean(0), found.mean(0))


def test_singular_and_empty_matrices(caplog):
    weight, inputs, kept = problem(rows=3)  # fewer positions than features
    residual = residual_of(weight, inputs, kept)
    for damping in (0.0, 0.01):
        update = least_squares(residual, damping, with_bias=True)
        assert torch.isfinite(update.weight).all() and update.error <= residual.energy
    nothing = torch.zeros(7, dtype=torch.bool)
    update = least_squares(residual_of(weight, inputs, nothing), 0.01, with_bias=True)
    assert update.weight.shape == (3, 0)
    torch.testing.assert_close(update.bias, weight @ inputs.mean(0))
    dead = inputs.clone()
    dead[:, kept] = 0
    assert not least_squares(residual_of(weight, dead, kept), 0.01, with_bias=False).weight.any()
