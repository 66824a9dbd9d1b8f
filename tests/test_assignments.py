"""`name=value` settings: read by the types of a method's fields, refused with what was expected."""

from __future__ import annotations

import dataclasses

import pytest

import genprune as gp
from genprune.errors import GenpruneError
from genprune.methods.assignments import _text, assigned
from genprune.methods.registry import _METHODS


@pytest.mark.parametrize(
    ("method", "text", "value"),
    [
        (gp.EcoDiff(), "train_steps=50", 50),
        (gp.EcoDiff(), " init = 1.5 ", 1.5),
        (gp.EcoDiff(), "guidance_scale=3.5", 3.5),
        (gp.EcoDiff(), "guidance_scale=2,5", (2.0, 5.0)),
        (gp.EcoDiff(), "guidance_scale=none", None),
        (gp.EcoDiff(), "learning_rates=neurons:0.1,heads:0.5", (("neurons", 0.1), ("heads", 0.5))),
        (gp.EcoDiff(), "block_checkpointing=true", True),
        (gp.EcoDiff(), "activation_memory=8GiB", "8GiB"),
        (gp.EcoDiff(), "activation_memory=one call", "one call"),
        (gp.EcoDiff(), "activation_memory=1000000", 1_000_000),
        (gp.EcoDiff(), "penalty=expected_l0", "expected_l0"),
        (gp.Taylor(), "timesteps=8", 8),
        (gp.Taylor(), "timesteps=10,500", (10, 500)),
        (gp.Taylor(), "protect=*attn2*", ("*attn2*",)),
        (gp.OBS(), "step_weights=0.8,1.2", (0.8, 1.2)),
    ],
)
def test_values_take_the_type_of_their_field(method, text, value):
    (found,) = assigned(method, [text]).values()
    assert found == value and type(found) is type(value)
    assert method.changed(**assigned(method, [text]))


@pytest.mark.parametrize("name", _METHODS)
def test_every_default_reads_back(name):
    method = _METHODS[name]()
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if value != ():
            assert assigned(method, [f"{field.name}={_text(value)}"]) == {field.name: value}


def test_the_last_of_two_counts():
    assert assigned(gp.Taylor(), ["steps=3", "steps=4"]) == {"steps": 4}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train_steps", "'train_steps' is no setting; expected NAME=VALUE. Pass e.g. --set seed=1"),
        ("train_steps=", "is no setting"),
        ("train_step=3", "EcoDiff has no 'train_step', nearest name: 'train_steps'; expected of, kinds"),
        ("train_steps=many", "no value for train_steps; expected a whole number. The default is --set train_steps="),
        ("guidance_scale=1,2,3", "expected a number or 2 values with a comma or none"),
        ("block_checkpointing=1", "expected true or false"),
        ("learning_rates=heads", "expected NAME:VALUE pairs with commas between them. The default is to leave it out"),
        ("keep=0.5", "has an option of its own. Pass --keep 0.5 instead"),
    ],
)
def test_what_is_no_setting_is_refused(text, words):
    with pytest.raises(GenpruneError) as error:
        assigned(gp.EcoDiff(), [text], flags=("keep",))
    assert words in str(error.value)
