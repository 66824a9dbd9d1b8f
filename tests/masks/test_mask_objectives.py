"""The loss: exact gradients in the memory of one call, the dense result as target, averages over rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from mask_cases import OPTIONS, QUICK, DenoiserCalls, learned_gates, relative_error

from genprune.denoising import draw_latents
from genprune.masks import MaskTraining
from genprune.masks.batches import TrajectoryBatch
from genprune.masks.objectives import (
    DenseLatents,
    arguments,
    chain_loss,
    per_step_loss,
    row_losses,
    trajectory_loss,
)

BATCH = TrajectoryBatch(("a cat", "two dogs"), (3, 4), rows=2, key=("fixed",))
SETTINGS = MaskTraining(**QUICK)


def loss_and_gradients(pipe, options, settings=SETTINGS, batch=BATCH, draw=0, function=trajectory_loss):
    with learned_gates(pipe) as gates:
        gates.draw = draw
        dense = DenseLatents(pipe, {"num_inference_steps": settings.denoising_steps} | options)
        loss = function(pipe, gates, dense, batch, settings)
        found = torch.autograd.grad(loss, gates.parameters(), allow_unused=True)
        return loss.detach(), [
            torch.zeros_like(values) if gradient is None else gradient
            for values, gradient in zip(gates.parameters(), found)
        ]


@pytest.mark.parametrize("case", ["sd", "flux", "flux true guidance"])
def test_pitfalls_5_6_7_14_the_gradient_is_that_of_plain_backpropagation(request, case):
    pipe = request.getfixturevalue(case.split()[0])
    loss, found = loss_and_gradients(pipe, OPTIONS[case])
    plain, expected = loss_and_gradients(pipe, OPTIONS[case], dataclasses.replace(SETTINGS, activation_memory=None))
    assert float(loss) > 0 and torch.equal(loss, plain)
    assert any(bool(gradient.any()) for gradient in expected)
    # float32 noise: the same sums in another order
    assert relative_error(found, expected) < 1e-5
    other_draw, gradients = loss_and_gradients(pipe, OPTIONS[case], draw=1)
    assert relative_error(gradients, expected) > 1e-2 and other_draw != loss  # so that the test can fail


@pytest.mark.parametrize("case", ["sd", "flux true guidance"])
def test_the_chain_objective_compares_the_latents_after_every_step(request, case):
    pipe = request.getfixturevalue(case.split()[0])
    loss, found = loss_and_gradients(pipe, OPTIONS[case], function=chain_loss)
    settings = dataclasses.replace(SETTINGS, activation_memory=None)
    plain, expected = loss_and_gradients(pipe, OPTIONS[case], settings, function=chain_loss)
    assert torch.equal(loss, plain) and relative_error(found, expected) < 1e-5
    with learned_gates(pipe) as gates, torch.no_grad():
        given = arguments(pipe, BATCH, {"num_inference_steps": SETTINGS.denoising_steps} | OPTIONS[case])
        gates.open()
        dense = draw_latents(pipe, whole_chain=True, **given)
        assert torch.equal(dense[-1], draw_latents(pipe, **given)) and len(dense) == SETTINGS.denoising_steps
        masked = draw_latents(pipe, gates=gates, whole_chain=True, **given)
    by_hand = torch.stack([row_losses(a, b, SETTINGS.loss) for a, b in zip(masked, dense)]).mean()
    assert float(loss) == pytest.approx(float(by_hand), rel=1e-5)


def test_the_root_of_the_relative_distance_is_finite_where_rows_agree():
    result = torch.tensor([[3.0, 4.0], [1.0, 0.0]], requires_grad=True)
    dense = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    losses = row_losses(result, dense, "rel_norm")
    assert torch.allclose(losses, row_losses(result, dense, "rel_l2").sqrt(), atol=1e-5)
    (gradient,) = torch.autograd.grad(losses.sum(), result)
    assert torch.isfinite(gradient).all() and not gradient[0].any() and gradient[1].any()


def test_pitfall_13_target_and_student_start_from_the_same_noise(sd):
    """With open gates nothing is lost, whatever the seeds; two rows see different noise."""
    dense = DenseLatents(sd, {"num_inference_steps": 2} | OPTIONS["sd"])
    target = dense.of(BATCH)
    with learned_gates(sd) as gates, torch.no_grad():
        gates.open()
        again = draw_latents(sd, **arguments(sd, BATCH, dense.options))
    assert torch.equal(target, again)
    same_prompt = dataclasses.replace(BATCH, prompts=("a cat", "a cat"), key=None)
    rows = dense.of(same_prompt)
    assert float((rows[0] - rows[1]).norm() / rows[0].norm()) > 0.1


def test_dense_latents_are_drawn_once_for_a_batch_that_comes_again(dit):
    batch = TrajectoryBatch((0, 1), (3, 4), rows=2, key=(0, 0))
    dense = DenseLatents(dit, {"num_inference_steps": 2, "guidance_scale": 1.0})
    with DenoiserCalls(dit) as calls:
        first = dense.of(batch)
        assert calls.count == 2 and torch.equal(dense.of(batch), first) and calls.count == 2
        assert torch.equal(dense.of(dataclasses.replace(batch, key=None)), first) and calls.count == 4
        dense.of(dataclasses.replace(batch, key=(0, 1)))
        assert calls.count == 6


def test_losses_of_rows():
    generator = torch.Generator().manual_seed(0)
    result, dense = (torch.randn(3, 2, 4, 4, generator=generator) for _ in range(2))
    one, other = result.double().reshape(3, -1), dense.double().reshape(3, -1)
    expected = {
        "rel_l2": [((a - b) ** 2).sum() / (b**2).sum() for a, b in zip(one, other)],
        "mse": [((a - b) ** 2).mean() for a, b in zip(one, other)],
        "l1": [(a - b).abs().mean() for a, b in zip(one, other)],
    }
    for name, values in expected.items():
        found = row_losses(result.bfloat16().float(), dense, name)
        torch.testing.assert_close(row_losses(result, dense, name).double(), torch.stack(values), rtol=1e-5, atol=0)
        assert found.dtype == torch.float32 and row_losses(dense.half(), dense.half(), name).dtype == torch.float32
        assert not row_losses(dense, dense, name).any()
    scaled = row_losses(10 * result, 10 * dense, "rel_l2")
    torch.testing.assert_close(scaled, row_losses(result, dense, "rel_l2"))
    assert torch.isfinite(row_losses(result, torch.zeros_like(dense), "rel_l2")).all()


def test_rows_of_other_processes_count_in_the_mean(dit):
    options = {"guidance_scale": 1.0}
    whole = TrajectoryBatch((0, 1), (3, 4), rows=2)
    parts = [TrajectoryBatch((label,), (seed,), rows=2) for label, seed in ((0, 3), (1, 4))]
    loss, expected = loss_and_gradients(dit, options, batch=whole)
    found = [loss_and_gradients(dit, options, batch=part) for part in parts]
    # kernels for one row and for two round otherwise
    assert float(found[0][0] + found[1][0]) == pytest.approx(float(loss), rel=1e-5)
    summed = [one + other for one, other in zip(found[0][1], found[1][1])]
    assert relative_error(summed, expected) < 1e-4


@pytest.mark.parametrize("case", ["sd", "flux true guidance"])
def test_the_per_step_ablation_compares_one_call_on_the_dense_inputs(request, case):
    pipe = request.getfixturevalue(case.split()[0])
    with DenoiserCalls(pipe) as calls:
        loss, gradients = loss_and_gradients(pipe, OPTIONS[case], function=per_step_loss)
    dense_calls = 4 if case == "flux true guidance" else 2
    assert calls.count == dense_calls + 1
    assert float(loss) > 0 and any(bool(gradient.any()) for gradient in gradients)
    losses = {float(loss_and_gradients(pipe, OPTIONS[case], draw=n, function=per_step_loss)[0]) for n in range(3)}
    assert len(losses) == 3


def test_arguments_name_what_each_pipeline_takes(sd):
    batch = dataclasses.replace(BATCH, guidance_scale=3.0)
    assert arguments(sd, batch, {"height": 16}) == {
        "height": 16, "seeds": (3, 4), "guidance_scale": 3.0, "prompts": ["a cat", "two dogs"]
    }  # fmt: skip
    true_guidance = arguments(sd, batch, {"true_cfg_scale": 2.0})
    assert true_guidance["true_cfg_scale"] == 3.0 and "guidance_scale" not in true_guidance
    labels = arguments(sd, TrajectoryBatch((0, 1), (3, 4), 2), {})
    assert labels == {"seeds": (3, 4), "class_labels": [0, 1]}
    assert arguments(sd, TrajectoryBatch(None, (3,), 1), {}) == {"seeds": (3,)}
