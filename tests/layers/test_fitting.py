"""Fits equal a naive float64 least squares, and are exact where a law says so."""

from __future__ import annotations

import pytest
import torch
from fitting_hosts import FLOAT64, Plain, batches, calls_of, lstsq, one, pixels, randomised, recorded
from tiny_hosts import ddpm_unet, flux, sd3, sd_unet, vit
from torch import Tensor, nn

from genprune.costs import count_costs
from genprune.denoising.replay import ModelCall
from genprune.operators import OPERATORS
from genprune.operators.base import argument_names

# ---- linear ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [False, True])
def test_linear_map_of_a_block_equals_lstsq(residual: bool):
    model = randomised(vit())
    calls = calls_of(model)
    settings = {"streams": [["x", 24, 24]], "residual": residual}
    operator = one(model, "blocks.1", "linear", settings, calls, damping=0.0)
    seen = recorded(model, "blocks.1", calls)
    inputs = [args[0].flatten(0, -2) for args, _, _ in seen]
    outputs = [(output - args[0] if residual else output).flatten(0, -2) for args, _, output in seen]
    weight, bias = lstsq(inputs, outputs, calls)
    torch.testing.assert_close(operator.replacement["x"].weight.detach(), weight, **FLOAT64)
    torch.testing.assert_close(operator.replacement["x"].bias.detach(), bias, **FLOAT64)


def test_linear_map_of_a_resnet_equals_lstsq():
    model = randomised(sd_unet())
    calls = calls_of(model, height=6, width=4, text_length=3, count=6)
    path = "up_blocks.1.resnets.1"
    resnet = model.get_submodule(path)
    settings = {"streams": [["input_tensor", resnet.in_channels, resnet.out_channels]]}
    operator = one(model, path, "linear", settings, calls, damping=0.0)
    seen = recorded(model, path, calls)
    weight, bias = lstsq([pixels(args[0]) for args, _, _ in seen], [pixels(out) for _, _, out in seen], calls)
    torch.testing.assert_close(operator.replacement["input_tensor"].weight.detach(), weight, **FLOAT64)
    torch.testing.assert_close(operator.replacement["input_tensor"].bias.detach(), bias, **FLOAT64)


@torch.no_grad()
def test_a_linear_module_is_found_exactly():
    torch.manual_seed(0)
    model, calls = Plain(nn.Linear(6, 4)), batches(5, 7, 6)
    operator = one(model, "part", "linear", {"streams": [["input", 6, 4]]}, calls, damping=0.0)
    inputs = torch.randn(2, 3, 6)
    torch.testing.assert_close(operator(inputs), model(inputs), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_damping_is_a_share_of_the_mean_diagonal_and_leaves_the_bias():
    torch.manual_seed(0)
    model, calls = Plain(nn.Linear(6, 4)), batches(5, 7, 6)
    operator = one(model, "part", "linear", {"streams": [["input", 6, 4]]}, calls, damping=0.3)
    weights = torch.cat([torch.full((35,), call.weight) for call in calls]).double()
    weights /= weights.sum()
    rows = torch.cat([call.inputs.flatten(0, 1) for call in calls]).double()
    outputs = model(rows.float()).double()
    mean, lack = weights @ rows, weights @ outputs
    gram = ((rows - mean) * weights[:, None]).T @ (rows - mean)
    cross = ((outputs - lack) * weights[:, None]).T @ (rows - mean)
    expected = cross @ torch.linalg.inv(gram + 0.3 * gram.diagonal().mean() * torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(operator.replacement["input"].weight, expected.float(), **FLOAT64)
    torch.testing.assert_close(operator.replacement["input"].bias, (lack - expected @ mean).float(), **FLOAT64)
    # So much that nothing but the mean is left.
    heavy = one(model, "part", "linear", {"streams": [["input", 6, 4]]}, calls, damping=1e9)
    torch.testing.assert_close(heavy(torch.zeros(1, 6))[0], lack.float(), **FLOAT64)


PAIR = ("encoder_hidden_states", "hidden_states")
STREAMS = [
    (flux, "transformer_blocks.0", PAIR, "tuple", True),
    (flux, "transformer_blocks.1.attn", PAIR[::-1], "tuple", False),
    (flux, "transformer_blocks.1.ff", ("hidden_states",), "tensor", False),
    (flux, "single_transformer_blocks.0", PAIR, "tuple", True),
    (flux, "single_transformer_blocks.1.attn", ("hidden_states",), "tensor", False),
    (sd3, "transformer_blocks.0", PAIR, "tuple", True),
    (sd3, "transformer_blocks.0.attn2", ("hidden_states",), "tensor", False),
    (sd3, "transformer_blocks.2", (None, "hidden_states"), "tuple", True),
    (sd_unet, "mid_block.attentions.0", ("hidden_states",), "tuple", True),
    (sd_unet, "mid_block.attentions.0.transformer_blocks.0", ("hidden_states",), "tensor", True),
    (sd_unet, "mid_block.attentions.0.transformer_blocks.0.attn2", ("hidden_states",), "tensor", False),
    (sd_unet, "mid_block.resnets.0", ("input_tensor",), "tensor", True),
    (ddpm_unet, "mid_block.attentions.0", ("hidden_states",), "tensor", True),
    (vit, "blocks.0.attn", ("x",), "tensor", False),
    (vit, "blocks.0.mlp", ("x",), "tensor", False),
]


@pytest.mark.parametrize(
    ("build", "path", "names", "returns", "residual"),
    [pytest.param(*row, id=f"{row[0].__name__}-{row[1]}") for row in STREAMS],
)
@torch.no_grad()
def test_every_stream_is_fitted_in_its_host(build, path: str, names, returns: str, residual: bool):
    """The error is that of least squares, item by item, and the host takes what the operator returns."""
    model = randomised(build())
    size = {} if build is vit else {"height": 8, "width": 8 if build is sd3 else 12}
    calls = calls_of(model, 4, **size, **({"text_length": 5} if build in (flux, sd3, sd_unet) else {}))
    calls = [ModelCall(call.inputs) for call in calls]
    seen = recorded(model, path, calls)
    streams = _streams(model.get_submodule(path), names, seen[0])
    settings = {"streams": streams, "returns": returns, "residual": residual}
    operator = one(model, path, "linear", settings, calls, damping=1e-7)
    for index, name in enumerate(names):
        inputs, outputs, found = [], [], []
        for args, kwargs, output in seen:
            value, fit = as_list(output)[index], as_list(operator(*args, **kwargs))[index]
            if name is None:
                assert value is None and fit is None
                continue
            start = operator.given(args, kwargs)[name]
            for held, map in ((inputs, start), (outputs, value), (found, fit)):
                held.append(pixels(map) if map.ndim == 4 else map.flatten(0, -2))
        if name is None:
            continue
        weight, bias = lstsq(inputs, outputs, calls)
        inputs, outputs = torch.cat(inputs), torch.cat(outputs)
        best = (outputs - inputs @ weight.T - bias).square().sum()
        left = (outputs - torch.cat(found)).square().sum()
        assert float(left) == pytest.approx(float(best), rel=1e-2, abs=1e-5 * float(outputs.square().sum()))
    _set(model, path, operator)
    calls[0].play(model)
    assert count_costs(model).params == sum(parameter.numel() for parameter in model.parameters())


def as_list(output) -> list[Tensor | None]:
    return [output] if isinstance(output, Tensor) else list(output)


def _streams(module: nn.Module, names, call) -> list[list | None]:
    """The streams with the widths that a call shows."""
    args, kwargs, output = call
    given = {**dict(zip(argument_names(module), args)), **kwargs}
    pairs = zip(names, as_list(output))
    return [name and [name, _features(given[name]), _features(value)] for name, value in pairs]


def _features(value: Tensor) -> int:
    return value.shape[1] if value.ndim == 4 else value.shape[-1]


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


# ---- the others -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_affine_is_the_norm_where_its_statistics_never_change():
    torch.manual_seed(0)
    norm = nn.LayerNorm(6)
    norm.weight.normal_()
    norm.bias.normal_()
    rows = torch.randn(200, 6)
    rows = 1.5 + 0.7 * (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True, correction=0)
    operator = one(Plain(norm), "part", "affine", {}, [ModelCall(rows)])
    torch.testing.assert_close(operator(rows), norm(rows), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("path", "dim"), [("mid_block.resnets.0.norm1", 1), ("mid_block.attentions.0.transformer_blocks.0.norm1", -1)]
)
def test_affine_is_least_squares_for_each_channel(path: str, dim: int):
    model = randomised(sd_unet())
    calls = calls_of(model, height=6, width=4, text_length=3)
    operator = one(model, path, "affine", {}, calls)
    seen = recorded(model, path, calls)
    inputs = [args[0].movedim(dim, -1).flatten(0, -2) for args, _, _ in seen]
    outputs = [output.movedim(dim, -1).flatten(0, -2) for _, _, output in seen]
    for channel in range(0, operator.replacement.weight.numel(), 7):
        part = slice(channel, channel + 1)
        weight, bias = lstsq([x[:, part] for x in inputs], [y[:, part] for y in outputs], calls)
        torch.testing.assert_close(operator.replacement.weight.detach()[part], weight[0], **FLOAT64)
        torch.testing.assert_close(operator.replacement.bias.detach()[part], bias, **FLOAT64)


@torch.no_grad()
def test_affine_of_a_constant_channel_is_its_mean():
    norm = nn.GroupNorm(2, 4)
    inputs = torch.randn(3, 4, 5, 2)
    inputs[:, 1] = 2.0
    operator = one(Plain(norm), "part", "affine", {}, [ModelCall(inputs)])
    assert operator.replacement.weight[1] == 0
    torch.testing.assert_close(operator.replacement.bias[1], norm(inputs)[:, 1].mean(), **FLOAT64)


@pytest.mark.parametrize("path", ["down_blocks.0.downsamplers.0", "up_blocks.0.upsamplers.0"])
@pytest.mark.parametrize("height", [6, 7])
def test_pooled_equals_lstsq(path: str, height: int):
    model = randomised(sd_unet(norm_num_groups=4, block_out_channels=(8, 16)))
    calls = calls_of(model, height=height, width=5, text_length=3, count=6)
    operator = one(model, path, "pooled", {}, calls, damping=0.0)
    seen = recorded(model, path, calls)
    resized = []
    for args, _, output in seen:
        if "down" in path:
            inputs = args[0]
            window = [
                [inputs[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean((2, 3)) for c in range(3)]
                for r in range(-(-height // 2))
            ]
            resized.append(torch.stack([torch.stack(row, -1) for row in window], -2))
        else:
            rows = (torch.arange(output.shape[2]) * args[0].shape[2]) // output.shape[2]
            columns = (torch.arange(output.shape[3]) * args[0].shape[3]) // output.shape[3]
            resized.append(args[0][:, :, rows][..., columns])
    weight, bias = lstsq([pixels(x) for x in resized], [pixels(y) for _, _, y in seen], calls)
    torch.testing.assert_close(operator.replacement.weight.detach()[..., 0, 0], weight, **FLOAT64)
    torch.testing.assert_close(operator.replacement.bias.detach(), bias, **FLOAT64)


@pytest.mark.parametrize("stride", [None, 2])
@torch.no_grad()
def test_whitened_rank_leaves_the_least_output_error(stride: int | None):
    torch.manual_seed(0)
    if stride is None:
        layer, calls = nn.Linear(9, 7), batches(4, 8, 9)
        rows = [call.inputs.flatten(0, 1) for call in calls]
    else:
        layer, calls = nn.Conv2d(9, 7, 1, stride), batches(4, 9, 6, 5)
        rows = [pixels(call.inputs[..., ::2, ::2]) for call in calls]
    settings = {"rank": 3, "whitened": True}
    operator = one(Plain(layer), "part", "low_rank", settings, calls)
    weight = layer.weight.flatten(1)
    design = torch.cat([r.double() * call.weight**0.5 for r, call in zip(rows, calls)])
    product = operator.replacement.up.weight.flatten(1) @ operator.replacement.down.weight.flatten(1)
    lost = (design @ (weight - product).double().T).square().sum()
    # No matrix of rank 3 is nearer to all outputs (Eckart-Young), and this one is attained by a product with W.
    expected = torch.linalg.svdvals(design @ weight.double().T)[3:].square().sum()
    assert float(lost) == pytest.approx(float(expected), rel=1e-4)
    plain = OPERATORS["low_rank"].from_weights(layer, {"rank": 3}).replacement
    plain = plain.up.weight.flatten(1) @ plain.down.weight.flatten(1)
    assert float((design @ (weight - plain).double().T).square().sum()) > 1.01 * float(expected)


@torch.no_grad()
def test_whitened_full_rank_is_the_layer_also_where_inputs_are_degenerate():
    torch.manual_seed(0)
    layer, inputs = nn.Linear(9, 7), torch.randn(50, 9)
    inputs[:, 4:] = inputs[:, :5]
    operator = one(Plain(layer), "part", "low_rank", {"rank": 7, "whitened": True}, [ModelCall(inputs)])
    torch.testing.assert_close(operator(inputs), layer(inputs), rtol=1e-4, atol=1e-4)
