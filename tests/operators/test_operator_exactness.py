"""Values from weights: exact where a law says so, and the best of their kind against a naive float64 reference."""

from __future__ import annotations

import pytest
import torch
from operator_cases import downsample, upsample
from torch import nn

from genprune.operators import OPERATORS

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums of a few hundred terms


def from_weights(name: str, module: nn.Module, **settings):
    return OPERATORS[name].from_weights(module, settings)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
@torch.no_grad()
def test_full_rank_is_the_layer(shape: tuple[int, int]):
    torch.manual_seed(0)
    linear, inputs = nn.Linear(*shape), torch.randn(3, 5, shape[0])
    torch.testing.assert_close(from_weights("low_rank", linear, rank=7)(inputs), linear(inputs), **CLOSE)


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1)])
@torch.no_grad()
def test_full_rank_is_the_convolution(stride: int, padding: int):
    torch.manual_seed(0)
    conv, inputs = nn.Conv2d(8, 6, 1, stride, padding), torch.randn(2, 8, 7, 4)
    torch.testing.assert_close(from_weights("low_rank", conv, rank=6)(inputs), conv(inputs), **CLOSE)


@torch.no_grad()
def test_truncated_rank_loses_the_small_singular_values():
    torch.manual_seed(0)
    linear = nn.Linear(12, 7)
    low = from_weights("low_rank", linear, rank=3).replacement
    lost = (linear.weight - low.up.weight @ low.down.weight).norm()
    expected = torch.linalg.svdvals(linear.weight.double())[3:].norm()
    assert float(lost) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("more", [{}, {"stride": 2, "padding": 1}, {"padding": 2, "dilation": 2}, {"bias": False}])
@pytest.mark.parametrize("kernel", [3, (3, 1)])
@torch.no_grad()
def test_separable_with_every_tap_is_the_convolution(kernel, more: dict):
    torch.manual_seed(0)
    conv, inputs = nn.Conv2d(5, 11, kernel, **more), torch.randn(2, 5, 9, 6)
    separable = from_weights("separable", conv, multiplier=conv.weight[0, 0].numel())
    torch.testing.assert_close(separable(inputs), conv(inputs), **CLOSE)


@torch.no_grad()
def test_separable_is_the_best_of_its_rank_for_each_input_channel():
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 11, 3, padding=1)
    layers = from_weights("separable", conv, multiplier=2).replacement
    for channel in range(5):
        kernels = layers.depthwise.weight[2 * channel : 2 * channel + 2].reshape(2, 9)
        found = layers.pointwise.weight[:, 2 * channel : 2 * channel + 2, 0, 0] @ kernels
        dense = conv.weight[:, channel].reshape(11, 9)
        expected = torch.linalg.svdvals(dense.double())[2:].norm()
        assert float((dense - found).norm()) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("padding", [0, 1])
@torch.no_grad()
def test_pooled_downsampling_is_exact_inside_constant_fields(padding: int):
    torch.manual_seed(0)
    module = downsample(padding)
    field = torch.randn(2, 8, 1, 1).expand(2, 8, 8, 12)
    found, expected = from_weights("pooled", module)(field), module(field)
    torch.testing.assert_close(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], **CLOSE)


@pytest.mark.parametrize("size", [None, (11, 7)])
@torch.no_grad()
def test_pooled_upsampling_is_exact_inside_constant_fields(size):
    torch.manual_seed(0)
    module = upsample()
    field = torch.randn(2, 8, 1, 1).expand(2, 8, 6, 4)
    found, expected = from_weights("pooled", module)(field, size), module(field, size)
    torch.testing.assert_close(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], **CLOSE)


@torch.no_grad()
def test_pooled_upsampling_takes_the_hosts_pixels():
    """Nearest pixels as the host takes them, where no kernel mixes neighbours."""
    torch.manual_seed(0)
    module, inputs = upsample(), torch.randn(2, 8, 6, 4)
    centre = module.conv.weight[..., 1, 1].clone()
    module.conv.weight.zero_()
    module.conv.weight[..., 1, 1] = centre
    for size in (None, (11, 7), (13, 9)):
        found = from_weights("pooled", module)(inputs, output_size=size)
        torch.testing.assert_close(found, module(inputs, output_size=size), **CLOSE)


@torch.no_grad()
def test_residual_zeros_are_the_skipped_module():
    module, inputs = nn.Linear(4, 4), torch.randn(2, 3, 4)
    operator = OPERATORS["linear"].build(module, {"streams": [["input", 4, 4]], "residual": True})
    assert torch.equal(operator(inputs), inputs)


def test_activations_and_norms_become_what_they_are_called():
    inputs = torch.tensor([[-2.0, -0.0, 3.0, 0.5]])
    assert from_weights("relu", nn.GELU())(inputs).tolist() == [[0.0, 0.0, 3.0, 0.5]]
    for module in (nn.SiLU(), nn.LayerNorm(4)):
        assert from_weights("identity", module)(inputs) is inputs


def test_gradients_reach_the_own_layers_alone():
    operator = OPERATORS["linear"].build(nn.Linear(4, 4), {"streams": [["input", 4, 4]]})
    operator(torch.randn(2, 4)).sum().backward()
    assert {name for name, value in operator.named_parameters() if value.grad is not None} == {
        "replacement.input.weight",
        "replacement.input.bias",
    }
    assert [name for name, _ in operator.named_parameters()] == [*operator.own_tensors()]
