"""Operators inside real models: costs as predicted, stock loaders raise, gaps of a U-Net that close in pairs."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_hosts import HOSTS, sd_unet
from torch import nn

from genprune.costs import count_costs, operating_point
from genprune.families import family_of, find_sites
from genprune.operators import OPERATORS, Operator, beside, build_operator
from genprune.replacements import PassThrough, ZeroOutput


def put(model: nn.Module, path: str, name: str, settings: dict | None = None) -> Operator:
    """Stand the operator in the module's place, with values from weights where it has them."""
    removed = model.get_submodule(path)
    known = OPERATORS[name].checked(settings or {})
    build = OPERATORS[name].build if OPERATORS[name].needs_data(known) else OPERATORS[name].from_weights
    operator = build(removed, settings or {})
    put_module(model, path, operator)
    return operator


def put_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def run(model: nn.Module, **given: int) -> torch.Tensor:
    torch.manual_seed(2)
    small = {"height": 8, "width": 12, "text_length": 5} if type(model).__name__.startswith("Flux") else {}
    point = operating_point(model, **({"batch": 2} | small | given))
    with torch.no_grad():
        output = model.eval()(**family_of(model).example_inputs(model, point, "cpu", torch.float32))
    return output if isinstance(output, torch.Tensor) else output.sample


def first_of_each(model: nn.Module) -> dict[str, list[str]]:
    """For each operator without choices, the modules of a model that it can stand in for."""
    names = ("identity", "relu", "affine", "pooled")
    return {
        name: [path for path, module in model.named_modules() if OPERATORS[name].refuses(module) is None]
        for name in names
    }


@pytest.mark.parametrize("host", HOSTS)
def test_every_activation_and_norm_of_a_host_can_be_replaced(host: str):
    """Also those that hosts call with names of their own, or whose attributes they read."""
    dense = HOSTS[host]()
    expected = run(dense)
    for name, paths in first_of_each(dense).items():
        model = copy.deepcopy(dense)
        for path in paths:
            if isinstance(model.get_submodule(path), Operator):
                continue  # one module under two names
            put(model, path, name)
        output = run(model)
        assert output.shape == expected.shape and output.isfinite().all()
        assert not paths or not torch.equal(output, expected)


@pytest.mark.parametrize("host", HOSTS)
def test_every_linear_and_convolution_at_full_rank_is_the_host(host: str):
    dense = HOSTS[host]().eval()
    expected = run(dense)
    model, count = copy.deepcopy(dense), 0
    for path, module in dense.named_modules():
        if OPERATORS["low_rank"].refuses(module) is None:
            put(model, path, "low_rank", {"rank": min(module.weight.shape[:2])})
        elif OPERATORS["separable"].refuses(module) is None:
            put(model, path, "separable", {"multiplier": min(len(module.weight), module.weight[0, 0].numel())})
        else:
            continue
        count += 1
    assert count > 10
    # Two roundings a layer, through all of them.
    assert (run(model) - expected).norm() < 1e-4 * expected.norm()


def test_costs_are_the_formulas():
    model = sd_unet()
    dense = count_costs(model, height=8, width=16)
    low = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    wide, pixels = model.get_submodule(low).in_features, 4 * 8
    put(model, low, "low_rank", {"rank": 5})
    after = count_costs(model, height=8, width=16)
    assert dense.params - after.params == wide * wide - 5 * 2 * wide
    assert dense.macs - after.macs == pixels * (wide * wide - 5 * 2 * wide)

    conv = "mid_block.resnets.0.conv1"
    put(model, conv, "separable", {"multiplier": 2})
    before, after = after, count_costs(model, height=8, width=16)
    saved = wide * wide * 9 - 2 * wide * (9 + wide)
    assert before.params - after.params == saved and before.macs - after.macs == pixels * saved

    put(model, "down_blocks.0.downsamplers.0", "pooled")
    before, after = after, count_costs(model, height=8, width=16)
    assert before.params - after.params == 8 * 32 * 32 and before.macs - after.macs == pixels * 8 * 32 * 32

    put(model, "up_blocks.0.upsamplers.0", "pooled")  # its 1x1 runs before the interpolation
    before, after = after, count_costs(model, height=8, width=16)
    assert before.params - after.params == 8 * 64 * 64
    assert before.macs - after.macs == (4 * pixels * 9 - pixels) * 64 * 64

    resnet = "mid_block.resnets.1"
    inside = sum(c.macs for path, c in after.modules.items() if f"{path}.".startswith(f"{resnet}."))
    put(model, resnet, "linear", {"streams": [["input_tensor", wide, wide]], "residual": True})
    assert after.macs - count_costs(model, height=8, width=16).macs == inside - pixels * wide * wide


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_stock_loader_raises(tmp_path, low_cpu_mem_usage: bool):
    model = sd_unet()
    for path, name, settings in (
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "low_rank", {"rank": 3}),
        ("mid_block.resnets.0.norm1", "identity", {}),
    ):
        changed = copy.deepcopy(model)
        put(changed, path, name, settings)
        changed.save_pretrained(tmp_path / name)
        with pytest.raises((RuntimeError, ValueError), match="shape|size"):
            type(model).from_pretrained(tmp_path / name, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize("size", [(8, 12), (12, 8)])
def test_a_resnet_and_its_partner_leave_together(size: tuple[int, int]):
    """The BK-SDM move: the up block's input without its skip, beside a down block that hands its input on."""
    model = sd_unet(layers_per_block=2)
    given = dict(zip(("height", "width"), size))
    expected = run(model, **given)
    up, down = "up_blocks.1.resnets.1", "down_blocks.0.resnets.1"
    channels = model.get_submodule(up).out_channels
    put(model, up, "drop_skip", {"channels": channels})
    put_module(model, down, PassThrough.of(model.get_submodule(down)))
    given_to_next, before = [], []
    model.get_submodule("up_blocks.1.attentions.1").register_forward_pre_hook(
        lambda module, inputs: given_to_next.append(inputs[0])
    )
    model.get_submodule("up_blocks.1.attentions.0").register_forward_hook(
        lambda module, inputs, output: before.append(output[0])
    )
    output = run(model, **given)
    assert output.shape == expected.shape and not torch.equal(output, expected)
    assert torch.equal(given_to_next[0], before[0])  # the stream passes as it was


@pytest.mark.parametrize("size", [(8, 12), (16, 8)])
def test_an_innermost_stage_loses_both_resamplers(size: tuple[int, int]):
    model = sd_unet(
        block_out_channels=(32, 64, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
    )
    given = dict(zip(("height", "width"), size))
    expected = run(model, **given)
    put(model, "down_blocks.1.downsamplers.0", "drop_resampler")
    put(model, "up_blocks.0.upsamplers.0", "drop_resampler")
    seen = []
    model.mid_block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    assert run(model, **given).shape == expected.shape
    assert seen[0][2:] == (size[0] // 2, size[1] // 2)


def test_checkpointing_trains_an_operator():
    model = sd_unet()
    path = "mid_block.attentions.0.transformer_blocks.0"
    settings = {"streams": [["hidden_states", 64, 64]], "residual": True}
    operator = put(model, path, "linear", settings)
    model.enable_gradient_checkpointing()
    model.train()
    point = operating_point(model, batch=1)
    inputs = family_of(model).example_inputs(model, point, "cpu", torch.float32)
    model(**inputs).sample.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in operator.parameters())


@pytest.mark.parametrize("host", ["sd", "flux", "sd3", "pixart", "vit"])
def test_sites_of_a_model_with_a_replaced_block(host: str):
    """A block that is an operator has no sites, as one that was removed has none."""
    model = HOSTS[host]().eval()
    block = next(site for site in find_sites(model).values() if site.kind == "block")
    names = block.gates[0].blend
    width = next(
        m.normalized_shape[0] for m in model.get_submodule(block.path).modules() if isinstance(m, nn.LayerNorm)
    )
    returns = "tuple" if len(names) > 1 else "tensor"
    settings = {"streams": [[name, width, width] for name in names], "returns": returns, "residual": True}
    gone = copy.deepcopy(model)
    for change in block.emptied:
        put_module(gone, change.module, change.build(gone.get_submodule(change.module)))
    put(model, block.path, "linear", settings)
    assert set(find_sites(model)) == set(find_sites(gone))
    torch.testing.assert_close(run(model), run(gone), rtol=0, atol=0)  # zeros and a residual: the block skipped
    assert model.get_submodule(block.path).state_dict().keys() > gone.get_submodule(block.path).state_dict().keys()
    assert not isinstance(gone.get_submodule(block.path), (Operator, ZeroOutput))


def test_an_operator_of_a_module_without_tensors_joins_the_model():
    model, norm = nn.Linear(4, 4).to(torch.bfloat16), nn.LayerNorm(4, elementwise_affine=False)
    values = {"replacement.weight": torch.ones(4), "replacement.bias": torch.ones(4)}
    for device in ("cpu", "meta"):
        operator = build_operator("affine", norm, {})
        operator.load_own(values)
        own = beside(operator, norm, model.to(device)).own_tensors()
        assert {value.dtype for value in own.values()} == {torch.bfloat16}
        assert all(value.eq(1).all() for value in own.values())
    own = beside(build_operator("affine", nn.LayerNorm(4), {}), nn.LayerNorm(4), model).own_tensors()
    assert {value.dtype for value in own.values()} == {torch.float32}  # the module says which


def test_build_operator_is_the_registry():
    operator = build_operator("identity", nn.SiLU(), {})
    assert type(operator) is OPERATORS["identity"]
