"""A preset survives the disk: the Pruned class with genprune, the stock export without; features pair as published."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
from preset_hosts import dense, inputs, run
from safetensors.torch import load_file, save_file

import genprune as gp
from genprune.presets import preset_plan
from genprune.recovery import feature_pairs
from genprune.stock import export_stock, stock_model

# The stock folder first, while genprune cannot be imported, then the Pruned one.
_PROGRAM = """
import sys

class NoGenprune:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "genprune":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoGenprune())
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

given = load_file("inputs.safetensors")
stock = UNet2DConditionModel.from_pretrained("stock")
assert "genprune" not in sys.modules
del sys.meta_path[0]
import genprune

pruned = genprune.PrunedUNet2DConditionModel.from_pretrained("pruned")
with torch.no_grad():
    outputs = {"stock": stock(**given).sample, "pruned": pruned(**given).sample}
save_file(outputs, "outputs.safetensors")
print(type(stock).__name__, type(pruned).__name__)
"""


@pytest.mark.parametrize("name", ["bk-sdm-base", "bk-sdm-tiny"])
def test_saved_and_loaded_in_a_fresh_process(name, tmp_path):
    model = copy.deepcopy(dense("sd"))
    small = gp.cut(model, preset_plan(model, name))
    given = inputs(small, 12, 20)
    small.save_pretrained(tmp_path / "pruned")
    export_stock(small, tmp_path / "stock")
    save_file({key: value.contiguous() for key, value in given.items()}, tmp_path / "inputs.safetensors")
    done = subprocess.run([sys.executable, "-c", _PROGRAM], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "not initialized" not in done.stderr  # no weight was made up
    assert done.stdout.split() == ["UNet2DConditionModel", "PrunedUNet2DConditionModel"]
    outputs = load_file(tmp_path / "outputs.safetensors")
    expected = run(small, given)
    for found in outputs.values():
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()  # another process, other threads


def test_the_plan_travels(tmp_path):
    plan = preset_plan(dense("sd"), "bk-sdm-tiny")
    assert gp.PruningPlan.load(plan.save(tmp_path / "plan")) == plan


OUTER = [f"{way}_blocks.{index}" for way in ("down", "up") for index in range(4)]
# As BK-SDM compares them: outputs of the blocks; Tiny lacks the innermost stage.
TINY = [
    ("down_blocks.0", "down_blocks.0"),
    ("down_blocks.1", "down_blocks.1"),
    ("down_blocks.2.attentions.0.proj_out", "down_blocks.2.attentions.1.proj_out"),
    ("up_blocks.0", "up_blocks.1"),
    ("up_blocks.1", "up_blocks.2"),
    ("up_blocks.2", "up_blocks.3"),
]


@pytest.mark.parametrize("name", ["bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"])
def test_features_of_a_stock_export_pair_as_published(name):
    teacher = dense("sd")
    plan = preset_plan(teacher, name)
    student = stock_model(gp.cut(copy.deepcopy(teacher), plan))
    expected = TINY if name.endswith("tiny") else [(path, path) for path in OUTER]
    assert feature_pairs(student, teacher, plan=plan) == expected


@pytest.mark.parametrize("name", ["bk-sdm-base", "bk-sdm-small"])
def test_features_of_a_cut_model_pair_with_themselves(name):
    teacher = dense("sd")
    student = gp.cut(copy.deepcopy(teacher), preset_plan(teacher, name))
    assert feature_pairs(student, teacher) == [(path, path) for path in OUTER]


def test_features_of_a_cut_tiny_pair_with_what_is_left():
    """The innermost stage stands as tombstones, the last downsampler of the stage before is gone."""
    teacher = dense("sd")
    student = gp.cut(copy.deepcopy(teacher), preset_plan(teacher, "bk-sdm-tiny"))
    own = [("down_blocks.0",) * 2, ("down_blocks.1",) * 2]
    own += [("down_blocks.2.attentions.0.proj_out", "down_blocks.2.attentions.1.proj_out")]
    assert feature_pairs(student, teacher) == [*own, *((f"up_blocks.{index}",) * 2 for index in (1, 2, 3))]
