"""Fits: passes over the calls, precision, and the model left as it was."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from fitting_hosts import FLOAT64, Plain, batches, calls_of, one, randomised
from tiny_hosts import flux, vit
from torch import nn

from genprune.denoising.replay import ModelCall
from genprune.errors import BadCalibrationData, GenpruneError
from genprune.layers.fitting import fitted

REQUESTS = {
    "a": ("blocks.0.attn", "linear", {"streams": [["x", 24, 24]]}),
    "b": ("blocks.1.norm1", "affine", {}),
    "c": ("blocks.2", "linear", {"streams": [["x", 24, 24]], "residual": True}),
    "d": ("blocks.0.mlp.fc1", "low_rank", {"rank": 4}),
    "e": ("blocks.1.mlp.fc1", "low_rank", {"rank": 4, "whitened": True}),
    "f": ("blocks.1.mlp.fc1", "low_rank", {"rank": 8, "whitened": True}),
    "g": ("blocks.1.mlp.act", "relu", {}),
}


class Counted(list):
    """Calls that count how often they are gone through."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def test_packages_give_the_same_operators():
    model = randomised(vit())
    calls = calls_of(model)
    together, apart = Counted(calls), iter(calls)
    found = fitted(model, REQUESTS, together)
    assert list(found) == list(REQUESTS) and together.passes == 1
    other = fitted(model, REQUESTS, apart, modules_per_pass=1)
    for key, operator in found.items():
        for name, value in operator.state_dict().items():
            assert torch.equal(value, other[key].state_dict()[name])


def test_several_ranks_share_their_moments():
    model = randomised(vit())
    calls = calls_of(model)
    counted = Counted(calls)
    requests = {rank: ("blocks.1.mlp.fc1", "low_rank", {"rank": rank, "whitened": True}) for rank in (2, 4, 6)}
    found = fitted(model, requests, counted, modules_per_pass=1)
    alone = one(model, *requests[4], calls)
    assert torch.equal(found[4].replacement.down.weight, alone.replacement.down.weight)
    assert found[2].replacement.down.weight.shape == (2, 24)
    assert counted.passes == 1


def test_nothing_is_played_where_weights_are_enough():
    def stop(model, inputs):
        raise AssertionError("played")

    found = fitted(vit(), {key: REQUESTS[key] for key in "dg"}, [ModelCall(None, loss_fn=stop)])
    assert found["d"].name == "low_rank" and found["g"].name == "relu"


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_stays_as_it_was(fails: bool):
    model = randomised(vit()).train()
    model.blocks[0].requires_grad_(False)
    model.blocks[2].eval()
    before = copy.deepcopy(model)
    calls = calls_of(model)
    if fails:
        calls.append(ModelCall(torch.randn(1, 2, 3)))
        with pytest.raises(Exception):  # noqa: B017  timm's own
            fitted(model, REQUESTS, calls)
    else:
        fitted(model, REQUESTS, calls)
    for (name, module), other in zip(model.named_modules(), before.modules()):
        assert module.training == other.training, name
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert type(module) is type(other)
    for (name, parameter), other in zip(model.named_parameters(), before.parameters()):
        assert torch.equal(parameter, other) and parameter.requires_grad == other.requires_grad, name


@torch.no_grad()
def test_fits_are_of_the_model_in_evaluation_mode():
    torch.manual_seed(0)
    model = Plain(nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5))).train()
    operator = one(model, "part", "linear", {"streams": [["input", 6, 4]]}, batches(5, 7, 6), damping=0.0)
    torch.testing.assert_close(operator.replacement["input"].weight, model.part[0].weight, **FLOAT64)


def test_half_precision_models_get_operators_of_their_own():
    model = randomised(flux()).to(torch.bfloat16)
    calls = calls_of(model, height=8, width=12, text_length=5)
    requests = {
        "norm": ("transformer_blocks.0.norm1.norm", "affine", {}),  # without tensors: the model says which dtype
        "ff": ("transformer_blocks.0.ff", "linear", {"streams": [["hidden_states", 24, 24]]}),
    }
    for operator in fitted(model, requests, calls).values():
        assert {value.dtype for value in operator.own_tensors().values()} == {torch.bfloat16}
        assert all(value.isfinite().all() and value.any() for value in operator.own_tensors().values())


def test_few_positions_warn_once(caplog: pytest.LogCaptureFixture):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    requests = {path: (path, "linear", {"streams": [["input", 9, 9]]}) for path in "01"}
    with caplog.at_level(logging.WARNING):
        fitted(model, requests, [ModelCall(torch.randn(4, 9))])
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 2 modules were fitted on fewer positions than features ('0': 4 on 9), so that the damping decides the "
        "rest; pass more prompts or data"
    ]


def test_errors_say_what_to_do():
    model, calls = Plain(nn.Linear(4, 4)), [ModelCall(torch.randn(8, 4))]
    linear = {"streams": [["input", 4, 4]]}
    with pytest.raises(GenpruneError, match="has no module 'prt', nearest name: 'part'; expected the path"):
        one(model, "prt", "linear", linear, calls)
    with pytest.raises(GenpruneError, match="no operator 'linea', nearest name: 'linear'"):
        one(model, "part", "linea", linear, calls)
    with pytest.raises(GenpruneError, match="'part' maps 'input' from 4 to 4 features; expected 4 to 5, as the"):
        one(model, "part", "linear", {"streams": [["input", 4, 5]]}, calls)
    with pytest.raises(GenpruneError, match="not finite; expected finite activations. Check the model's weights"):
        one(model, "part", "linear", linear, [ModelCall(torch.full((8, 4), torch.inf))])
    for damping in (-0.1, float("nan"), float("inf"), "much"):
        with pytest.raises(GenpruneError, match="expected a finite number >= 0. Pass e.g. damping=0.01"):
            one(model, "part", "linear", linear, calls, damping=damping)
    with pytest.raises(GenpruneError, match="modules_per_pass is 0; expected a whole number >= 1, or None"):
        one(model, "part", "linear", linear, calls, modules_per_pass=0)
    model.aside = nn.Linear(4, 4)
    with pytest.raises(BadCalibrationData, match="'aside' never ran with 'input'.* Calibrate on inputs like those"):
        one(model, "aside", "linear", linear, calls)
