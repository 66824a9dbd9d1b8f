"""Laws that every operator meets: the host's shapes, independence, tombstones, round trips, harmless errors."""

from __future__ import annotations

import copy

import pytest
import torch
from operator_cases import CASES, OperatorCase, cast, host, tensors
from torch import nn

from genprune.errors import GenpruneError, PlanMismatch
from genprune.operators import OPERATORS, Operator, build_operator, operator_named
from genprune.replacements import Tombstone

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def built(case: OperatorCase, removed: nn.Module | None = None) -> Operator:
    """The operator with random values of its own."""
    operator = build_operator(case.operator, host(case) if removed is None else removed, case.settings)
    torch.manual_seed(5)
    operator.load_own({name: torch.randn(value.shape) for name, value in operator.own_tensors().items()})
    return operator


def same(left, right, **tolerance) -> None:
    for one, other in zip(tensors(left), tensors(right), strict=True):
        if one is None:
            assert other is None
        else:
            torch.testing.assert_close(one, other, **(tolerance or {"rtol": 0, "atol": 0}))


def test_the_table_has_every_operator():
    assert {case.operator for case in CASES} == set(OPERATORS)


@every_case
@torch.no_grad()
def test_output_has_the_hosts_shape(case: OperatorCase):
    module, operator = host(case), built(case)
    for call in case.calls():
        if case.operator == "drop_resampler":
            assert operator(**call) is call["hidden_states"]
            continue
        for expected, found in zip(tensors(module(**call)), tensors(operator(**call)), strict=True):
            assert (found is None) == (expected is None)
            assert found is None or found.shape == expected.shape


@every_case
@torch.no_grad()
def test_arguments_by_position_are_arguments_by_name(case: OperatorCase):
    # What gradient checkpointing does.
    operator = built(case)
    for call in case.calls():
        same(operator(*[call.get(name) for name in operator.argument_names]), operator(**call))


@every_case
@torch.no_grad()
def test_bfloat16_and_autocast(case: OperatorCase):
    call = case.calls()[0]
    module = host(case).to(torch.bfloat16)
    for output in tensors(built(case, module).to(torch.bfloat16)(**cast(call, torch.bfloat16))):
        assert output is None or output.dtype == torch.bfloat16
    operator = built(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = operator(**call)
    for low, full in zip(tensors(autocast), tensors(operator(**call))):
        assert full is None or (low.float() - full).norm() < 0.02 * full.norm()  # 8 bits of mantissa


@every_case
def test_dtype_device_and_cost(case: OperatorCase):
    module = host(case).to(torch.bfloat16)
    operator = build_operator(case.operator, module, case.settings)
    if any(True for _ in module.parameters()):
        assert all(tensor.dtype == torch.bfloat16 for tensor in operator.own_tensors().values())
    assert sum(parameter.numel() for parameter in operator.parameters()) == case.weights
    assert not operator.training
    meta = build_operator(case.operator, module.to("meta"), case.settings)
    if any(True for _ in module.parameters()):
        assert all(tensor.is_meta for tensor in meta.state_dict().values())


@every_case
@torch.no_grad()
def test_meta_build_takes_its_values(case: OperatorCase):
    operator, module = built(case), host(case).to("meta")
    empty = build_operator(case.operator, module, case.settings)
    empty.load_own(operator.own_tensors())
    same(empty(**case.calls()[0]), operator(**case.calls()[0]))
    for name, tensor in empty.own_tensors().items():
        assert tensor.data_ptr() != operator.get_parameter(name).data_ptr()


@every_case
@torch.no_grad()
def test_state_dict_round_trip_and_independent_copy(case: OperatorCase):
    operator, call = built(case), case.calls()[0]
    before = operator(**call)
    other = build_operator(case.operator, host(case), case.settings)
    other.load_state_dict(operator.state_dict(), strict=True)
    same(other(**call), before)
    twin = copy.deepcopy(operator)
    same(twin(**call), before)
    for parameter in twin.parameters():
        parameter.zero_()
    same(operator(**call), before)


@every_case
def test_tombstones_are_those_of_the_module(case: OperatorCase):
    module = host(case)
    operator = built(case, module)
    expected = {name: 0 for name in module.state_dict()}
    found = {
        name: value.numel() for name, value in operator.state_dict().items() if name not in operator.own_tensors()
    }
    assert found == expected
    assert Tombstone.of(operator).state_dict().keys() == expected.keys()
    inside = Tombstone.of(nn.Sequential(operator, nn.Linear(2, 2))).state_dict().keys()
    assert inside == Tombstone.of(nn.Sequential(module, nn.Linear(2, 2))).state_dict().keys()
    if expected:
        with pytest.raises(RuntimeError, match="size mismatch"):
            host(case).load_state_dict(operator.state_dict(), strict=False)


@every_case
def test_building_changes_nothing_else(case: OperatorCase):
    module = host(case)
    before, numbers = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    build_operator(case.operator, module, case.settings)
    assert torch.equal(torch.get_rng_state(), numbers)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


@every_case
def test_what_hosts_read_is_still_there(case: OperatorCase):
    module = host(case)
    operator = built(case, module)
    for name in ("in_features", "out_features", "in_channels", "out_channels", "channels", "context_pre_only"):
        if isinstance(getattr(module, name, None), (int, bool)):
            assert getattr(operator, name) == getattr(module, name)
    assert operator.name == case.operator  # a resampler has a name of its own


@every_case
@torch.no_grad()
def test_compiles_whole(case: OperatorCase):
    operator, call = built(case), case.calls()[0]
    torch._dynamo.reset()
    compiled = torch.compile(operator, fullgraph=True, backend="eager")
    same(compiled(**call), operator(**call))


@every_case
def test_wrong_settings_and_tensors_are_errors(case: OperatorCase):
    module = host(case)
    with pytest.raises(
        GenpruneError, match=f"'{case.operator}' has no setting 'colour'; expected .* Rename or remove"
    ):
        build_operator(case.operator, module, {**case.settings, "colour": 1})
    operator = built(case, module)
    own = operator.own_tensors()
    with pytest.raises(PlanMismatch, match="'replacement.more' of a .* is unknown.* expected .* Take the tensors"):
        operator.load_own({**own, "replacement.more": torch.ones(1)})
    for name in own:
        before = copy.deepcopy(own)
        with pytest.raises(PlanMismatch, match=f"'{name}' of a .* is missing; expected"):
            operator.load_own({key: value for key, value in own.items() if key != name})
        with pytest.raises(PlanMismatch, match=rf"'{name}' of a .* is \(3, 0\), expected \("):
            operator.load_own({key: value * 2 for key, value in own.items()} | {name: torch.ones(3, 0)})
        for key, value in operator.own_tensors().items():
            assert torch.equal(value, before[key])


@pytest.mark.parametrize(
    ("operator", "settings", "module", "message"),
    [
        ("low_rank", {}, nn.Linear(4, 4), "got no setting 'rank'; expected rank, whitened. Pass it"),
        ("low_rank", {"rnk": 1}, nn.Linear(4, 4), "no setting 'rnk', nearest name: 'rank'"),
        ("low_rank", {"rank": 5}, nn.Linear(4, 9), "'rank' of 'low_rank' is 5; expected a whole number, 1 to 4"),
        ("low_rank", {"rank": True}, nn.Linear(4, 9), "is True; expected a whole number"),
        ("low_rank", {"rank": 2, "whitened": 1}, nn.Linear(4, 9), "'whitened' of 'low_rank' is 1; expected True or"),
        ("low_rank", {"rank": 2}, nn.Conv2d(4, 4, 3), r"cannot stand in for this Conv2d: its kernel is \(3, 3\)"),
        ("low_rank", {"rank": 2}, nn.Conv2d(4, 4, 1, groups=2), "in 2 groups; expected 1x1 in one group"),
        ("low_rank", {"rank": 2}, nn.SiLU(), "this SiLU: expected a Linear, or a Conv2d of kernel 1x1. Choose"),
        ("separable", {"multiplier": 10}, nn.Conv2d(4, 12, 3), "is 10; expected a whole number, 1 to 9"),
        ("separable", {"multiplier": 1}, nn.Conv2d(4, 4, 1), "its kernel is 1x1; use 'low_rank'"),
        ("separable", {"multiplier": 1}, nn.Conv2d(4, 4, 3, groups=4), "it has 4 groups; expected one"),
        ("pooled", {}, nn.Conv2d(4, 4, 3), "expected a Downsample2D or Upsample2D"),
        ("identity", {}, nn.Linear(4, 4), "expected an activation of single numbers, or a group"),
        ("relu", {}, nn.ReLU(), "it is a ReLU already"),
        ("relu", {}, nn.GLU(), "expected an activation of single numbers"),
        ("relu", {}, nn.LayerNorm(4), "expected an activation of single numbers"),
        ("affine", {}, nn.LayerNorm((4, 4)), "over one dimension of channels"),
        (
            "linear",
            {"streams": [["input", 4]]},
            nn.Linear(4, 4),
            "expected a list of .argument name, in, out. or null",
        ),
        ("linear", {"streams": [None]}, nn.Linear(4, 4), "expected a list of"),
        ("linear", {"streams": [["inputs", 4, 4]]}, nn.Linear(4, 4), "no argument 'inputs', nearest name: 'input'"),
        ("linear", {"streams": [["input", 4, 3]], "residual": True}, nn.Linear(4, 3), "as many outputs as inputs"),
        ("linear", {"streams": [["a", 4, 3]] * 2, "returns": "tensor"}, nn.Linear(4, 3), "is 'tensor' for 2 streams"),
        ("linear", {"streams": [["a", 4, 3]] * 2, "returns": "tuple"}, nn.Linear(4, 3), "and no name twice"),
        ("linear", {"streams": [["input", 4, 3]]}, nn.ModuleList(), "it has no forward of its own"),
        ("drop_skip", {"channels": 4}, nn.Linear(4, 3), "expected a ResnetBlock2D"),
        ("drop_resampler", {}, nn.Linear(4, 3), "expected a Downsample2D or Upsample2D"),
    ],
)
def test_refusals(operator: str, settings: dict, module: nn.Module, message: str):
    with pytest.raises(GenpruneError, match=message):
        build_operator(operator, module, settings)


def test_resnets_and_resamplers_that_cannot_be_dropped():
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    make = {"temb_channels": None, "groups": 4}
    with pytest.raises(GenpruneError, match="reads 8 channels and returns 8: it has no skip"):
        build_operator("drop_skip", ResnetBlock2D(in_channels=8, **make), {"channels": 8})
    up = ResnetBlock2D(in_channels=24, out_channels=8, **make)
    with pytest.raises(GenpruneError, match="hands 16 hidden channels on, but what follows reads 8"):
        build_operator("drop_skip", up, {"channels": 16})
    with pytest.raises(GenpruneError, match="it turns 4 channels into 8"):
        build_operator("drop_resampler", Downsample2D(4, True, 8), {})
    assert "no convolution to save" in operator_named("pooled").refuses(Upsample2D(4))
    assert "interpolates" in operator_named("pooled").refuses(Upsample2D(4, use_conv_transpose=True, use_conv=True))
    assert "holds a norm" in operator_named("pooled").refuses(
        Downsample2D(4, True, norm_type="ln_norm", eps=1e-5, elementwise_affine=True)
    )


def test_unknown_operator():
    with pytest.raises(GenpruneError, match="no operator 'lowrank', nearest name: 'low_rank'; expected one of"):
        operator_named("lowrank")


@pytest.mark.parametrize(
    ("operator", "settings", "module"),
    [
        ("affine", {}, nn.LayerNorm(4)),
        ("linear", {"streams": [["input", 4, 4]]}, nn.Linear(4, 4)),
        ("low_rank", {"rank": 2, "whitened": True}, nn.Linear(4, 4)),
    ],
)
def test_what_needs_data_says_so(operator: str, settings: dict, module: nn.Module):
    with pytest.raises(GenpruneError, match="takes its values from calibration data.* Fit it with genprune.layers"):
        OPERATORS[operator].from_weights(module, settings)


def test_a_block_that_holds_operators_can_be_replaced():
    case = next(case for case in CASES if case.id == "linear-block")
    dense, changed = host(case), host(case)
    changed.attn1.to_q = build_operator("low_rank", changed.attn1.to_q, {"rank": 2})
    changed.ff = build_operator("linear", changed.ff, {"streams": [["hidden_states", 12, 12]]})
    over = build_operator("linear", changed, case.settings)
    plain = build_operator("linear", dense, case.settings)
    assert over.state_dict().keys() == plain.state_dict().keys()
    again = build_operator("linear", over, case.settings)
    assert again.state_dict().keys() == plain.state_dict().keys()
    assert again.argument_names == plain.argument_names
