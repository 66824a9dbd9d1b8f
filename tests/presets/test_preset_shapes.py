"""Every preset on narrow hosts: gated == cut == stock export, with the weights of the host that the shape keeps."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from preset_hosts import dense, difference, inputs, run
from tiny_hosts import dit, flux, pixart, sd3, vit

import genprune as gp
from genprune.presets import preset_plan
from genprune.stock import export_stock, stock_export_of, stock_model

LAYER_GONE = {"layers_per_block": 1, "down_blocks.0.resnets": 1, "up_blocks.0.resnets": 2}
# Preset, host -> fields of the stock configuration and lengths of its lists of modules.
SHAPES = {
    ("bk-sdm-base", "sd"): LAYER_GONE | {"mid_block_type": "UNetMidBlock2DCrossAttn"},
    ("bk-sdm-small", "sd"): LAYER_GONE | {"mid_block_type": None},
    ("bk-sdm-tiny", "sd2"): LAYER_GONE
    | {
        "mid_block_type": None,
        "block_out_channels": (8, 16, 16),
        "attention_head_dim": [1, 2, 4],
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    },
    ("koala-1b", "sdxl"): LAYER_GONE
    | {"transformer_layers_per_block": [1, 2, 6], "mid_block_type": "UNetMidBlock2DCrossAttn"},
    ("koala-700m", "sdxl"): LAYER_GONE | {"transformer_layers_per_block": [1, 2, 5], "mid_block_type": None},
    ("ssd-1b", "sdxl"): {
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
        "mid_block.resnets": 1,
    },
    ("vega", "sdxl"): {
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 1, 2],
        "mid_block_type": "UNetMidBlock2D",
    },
}


@pytest.mark.parametrize(("name", "host"), SHAPES)
def test_gated_is_cut_is_stock(name, host):
    from diffusers import UNet2DConditionModel

    model = copy.deepcopy(dense(host))
    plan = preset_plan(model, name)
    small = gp.cut(copy.deepcopy(model), plan)
    stock = stock_model(small)
    assert type(stock) is UNet2DConditionModel and "pruning" not in stock.config
    for size in ((12, 20), (16, 8))[: 1 if host == "sdxl" else 2]:  # the first needs the skips' sizes to sample up to
        given = inputs(model, *size)
        whole = run(model, given)
        with gp.attach_gates(model, plan):
            gated = run(model, given)
        found = run(small, given)
        assert difference(gated, found) <= 1e-5
        assert difference(whole, found) >= 1e-2
        assert difference(found, run(stock, given)) <= 1e-6  # the same operations, in the same order
    for key, value in SHAPES[name, host].items():
        if "." in key:
            assert len(stock.get_submodule(key)) == value
        else:
            assert json.dumps(stock.config[key]) == json.dumps(value), key
    assert plan.figures["params"] == sum(p.numel() for p in stock.parameters())
    assert plan.figures["params"] == sum(p.numel() for p in small.parameters())


def same(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    return all(torch.equal(value, right.state_dict()[name]) for name, value in left.state_dict().items())


def test_weights_are_carried_as_published():
    """BK-SDM's own map of weights: the second layer on the way up takes the third's."""
    teacher = dense("sd")
    base = stock_model(gp.cut(copy.deepcopy(teacher), preset_plan(teacher, "bk-sdm-base")))
    tiny = stock_model(gp.cut(copy.deepcopy(teacher), preset_plan(teacher, "bk-sdm-tiny")))
    for index in range(1, 4):
        for student, ours in ((base, index), (tiny, index - 1)):
            for part in ("resnets", "attentions"):
                for layer, other in ((0, 0), (1, 2)):
                    path = f"up_blocks.{ours}.{part}.{layer}"
                    assert same(
                        student.get_submodule(path), teacher.get_submodule(f"up_blocks.{index}.{part}.{other}")
                    )
    assert same(base.up_blocks[0].resnets[1], teacher.up_blocks[0].resnets[2])
    assert same(base.mid_block, teacher.mid_block)
    assert same(tiny.up_blocks[0].upsamplers, teacher.up_blocks[1].upsamplers)


def test_which_transformer_blocks_stay():
    teacher = dense("sdxl")
    wrapper = "down_blocks.2.attentions.0.transformer_blocks"
    for which, stay in (("first", [0, 1, 2, 3, 4, 5]), ("even", [0, 1, 3, 5, 6, 8])):
        plan = preset_plan(teacher, "koala-1b", which=which)
        assert [i for i in range(10) if f"{wrapper}.{i}:block" not in plan.keep] == stay
        export = stock_export_of(teacher, plan.keep, plan.ops)
        new = [export.renamed(f"{wrapper}.{index}.norm1.weight") for index in stay]
        assert new == [f"{wrapper}.{index}.norm1.weight" for index in range(6)]
        upwards = wrapper.replace("down_blocks.2.attentions.0", "up_blocks.0.attentions.2")
        assert export.renamed(f"{upwards}.{stay[-1]}.norm1.weight") == (
            "up_blocks.0.attentions.1.transformer_blocks.5.norm1.weight"
        )


TRANSFORMERS = {
    "dit": (dit, ["transformer_blocks.1"]),
    "pixart": (pixart, ["transformer_blocks.1"]),
    "flux": (flux, ["transformer_blocks.1", "single_transformer_blocks.1"]),
    "sd3": (sd3, ["transformer_blocks.1"]),
    "vit": (vit, ["blocks.1"]),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_alternate_layers(name):
    build, gone = TRANSFORMERS[name]
    model = build().eval()
    with torch.no_grad():  # gates and outputs that start at zero would hide what goes
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    plan = preset_plan(model, "alternate-layers")
    assert list(plan.keep) == [f"{path}:block" for path in gone] and not plan.ops
    given = inputs(model, *((32, 32) if name == "vit" else (8, 8)))
    whole = run(model, given)
    with gp.attach_gates(model, plan):
        gated = run(model, given)
    small = gp.cut(copy.deepcopy(model), plan)
    assert difference(gated, run(small, given)) <= 1e-5
    assert difference(whole, gated) >= 1e-3
    stock = stock_model(small)
    assert torch.equal(run(stock, given), run(small, given))
    assert plan.figures["params"] == sum(p.numel() for p in stock.parameters())


def test_the_share_of_alternate_layers():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=12, embed_dim=24, num_heads=3)

    def removed(keep):
        return [int(n.split(".")[1].split(":")[0]) for n in preset_plan(model, "alternate-layers", keep=keep).keep]

    assert removed(None) == [1, 3, 5, 7, 9, 11]
    assert removed(0.75) == [3, 7, 11]
    assert removed(0.5) == [1, 3, 5, 7, 9, 11]
    assert removed(0.25) == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert removed(0.1) == list(range(1, 12))
    share = preset_plan(sd3(), "alternate-layers", keep=0.67)  # its third and last block cannot go
    assert list(share.keep) == ["transformer_blocks.1:block"]


def test_a_pipeline_takes_a_preset(tmp_path):
    from tiny_pipelines import sd_pipeline

    pipe = sd_pipeline(tmp_path)
    pipe.register_modules(unet=copy.deepcopy(dense("sd")))
    gp.cut(pipe, preset_plan(pipe, "bk-sdm-tiny"))
    assert type(pipe.unet) is gp.PrunedUNet2DConditionModel
    export_stock(pipe, tmp_path / "pipe")
    assert (tmp_path / "pipe" / "unet" / "config.json").is_file()
