"""Laws of gates, over every family: they change what they say, follow copies, carry gradients, and leave no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from family_cases import DenseRun, difference, random_keep, run
from torch import nn

from genprune.errors import NoMatchingSites, PlanMismatch
from genprune.gates import attach_gates, gated_sites


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def ones(dense: DenseRun) -> dict[str, torch.Tensor]:
    return {name: torch.ones(site.size) for name, site in dense.sites.items()}


@torch.no_grad()
def test_gates_of_one_are_bit_identical(dense: DenseRun):
    with attach_gates(dense.model, ones(dense)):
        assert torch.equal(run(dense.model, dense.inputs), dense.output)


@torch.no_grad()
def test_gates_of_one_are_bit_identical_in_bfloat16(dense: DenseRun):
    model = dense.copy().to(torch.bfloat16)
    inputs = to_bfloat16(dense.inputs)
    plain = run(model, inputs)
    with attach_gates(model, ones(dense)):  # float32 gates: they must not promote the host
        gated = run(model, inputs)
    assert gated.dtype == torch.bfloat16
    assert torch.equal(gated, plain)


def to_bfloat16(inputs: dict) -> dict:
    changed = {}
    for name, value in inputs.items():
        if isinstance(value, dict):
            changed[name] = to_bfloat16(value)
        else:
            changed[name] = value.to(torch.bfloat16) if value.is_floating_point() else value
    return changed


@torch.no_grad()
def test_detached_gates_leave_no_trace(dense: DenseRun):
    before = hooks(dense.model)
    handle = attach_gates(dense.model, dense.plan(random_keep(dense.sites, seed=1)))
    assert set(gated_sites(dense.model)) == set(dense.sites)
    assert not torch.equal(run(dense.model, dense.inputs), dense.output)
    handle.remove()
    assert hooks(dense.model) == before
    assert gated_sites(dense.model) == []
    assert torch.equal(run(dense.model, dense.inputs), dense.output)


def test_a_refused_gate_attaches_nothing(dense: DenseRun):
    before = hooks(dense.model)
    name = next(iter(dense.sites))
    with pytest.raises(NoMatchingSites, match="no site matches 'nowhere:heads'.*List them with gp.find_sites"):
        attach_gates(dense.model, {name: torch.ones(dense.sites[name].size), "nowhere:heads": torch.ones(1)})
    with pytest.raises(PlanMismatch, match=rf"float32 of shape \(1000,\); expected .* \({dense.sites[name].size},\)"):
        attach_gates(dense.model, {name: torch.ones(1000)})
    with pytest.raises(PlanMismatch, match=r"float32 of shape \(2, 1, \d+\); expected .* or \(rows, "):
        attach_gates(dense.model, {name: torch.ones(2, 1, dense.sites[name].size)})
    with pytest.raises(PlanMismatch, match="torch.bool"):
        attach_gates(dense.model, {name: torch.ones(dense.sites[name].size, dtype=torch.bool)})
    assert hooks(dense.model) == before


@torch.no_grad()
def test_a_deep_copy_of_a_gated_model_is_independent(dense: DenseRun):
    original = dense.copy()
    with attach_gates(original, ones(dense)) as handle:
        twin = copy.deepcopy(original)
        name = next(iter(handle))
        handle[name] = torch.zeros(dense.sites[name].size)
        assert torch.equal(run(twin, dense.inputs), dense.output)  # its gate is its own
        changed = run(original, dense.inputs)
        assert not torch.equal(changed, dense.output)
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(run(original, dense.inputs), changed)
        assert not run(twin, dense.inputs).any()  # it runs its own weights


def test_every_gate_gets_a_gradient(dense: DenseRun):
    values = {name: value.requires_grad_() for name, value in ones(dense).items()}
    weights = torch.randn(dense.output.shape, generator=torch.Generator().manual_seed(5))
    with attach_gates(dense.model, values):
        (run(dense.model, dense.inputs) * weights).sum().backward()
    dense.model.zero_grad()
    for name, value in values.items():
        assert value.grad is not None and value.grad.isfinite().all(), name
        assert value.grad.count_nonzero() >= value.numel() / 2, name


@torch.no_grad()
def test_a_gate_gradient_is_the_slope_of_the_output(dense: DenseRun):
    model = dense.copy().double()
    inputs = to_double(dense.inputs)
    for kind in dense.sites.kinds():
        name, site = next(iter(dense.sites.of_kind(kind).items()))
        value = torch.full((site.size,), 0.7, dtype=torch.double)
        step = torch.zeros_like(value)
        step[-1] = 3e-3
        with torch.enable_grad(), attach_gates(model, {name: value.clone().requires_grad_()}) as handle:
            (slope,) = torch.autograd.grad(run(model, inputs).sum(), handle.values())
        with attach_gates(model, {name: value + step}) as handle:
            above = run(model, inputs).sum()
            handle[name] = value - step
            below = run(model, inputs).sum()
        # Central differences: an error of order step squared, and of float32 noise (rotary embeddings) over the step.
        assert float((above - below) / 6e-3) == pytest.approx(float(slope[-1]), rel=2e-3, abs=1e-3), name


def to_double(inputs: dict) -> dict:
    return {
        name: to_double(value) if isinstance(value, dict) else value.double() if value.is_floating_point() else value
        for name, value in inputs.items()
    }


def one_row(inputs: dict, row: int) -> dict:
    """Row `row` of a batch of two; position ids have no rows."""
    chosen = {}
    for name, value in inputs.items():
        if isinstance(value, dict):
            chosen[name] = one_row(value, row)
        else:
            chosen[name] = value if name in ("img_ids", "txt_ids") else value[row : row + 1]
    return chosen


@torch.no_grad()
def test_rows_of_gates_equal_single_rows(dense: DenseRun):
    source = torch.Generator().manual_seed(2)
    gates = {name: torch.rand(2, site.size, generator=source) for name, site in dense.sites.items()}
    with attach_gates(dense.model, gates) as handle:
        together = run(dense.model, dense.inputs)
        for row in range(2):
            for name in handle:
                handle[name] = gates[name][row]
            # Other matrix shapes add up in another order.
            assert difference(together[row : row + 1], run(dense.model, one_row(dense.inputs, row))) < 1e-5


@torch.no_grad()
def test_rows_that_fit_no_batch_are_refused(dense: DenseRun):
    name, site = next(iter(dense.sites.items()))
    with attach_gates(dense.model, {name: torch.ones(3, site.size)}):
        with pytest.raises(PlanMismatch, match="has 3 rows, the activation 2; expected one row per batch row. Set"):
            run(dense.model, dense.inputs)
