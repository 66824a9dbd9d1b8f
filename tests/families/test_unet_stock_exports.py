"""Stock exports of U-Nets that lost layers, stages, their middle or the attention of a stage."""

from __future__ import annotations

import itertools
import json
from functools import cache

import pytest
import torch
from family_cases import DenseRun, FamilyCase, difference, example_inputs, randomise_, run, unet

import genprune as gp
from genprune.cutting import plan_base
from genprune.families import StockExport, family_of, find_sites
from genprune.operations import replace_op
from genprune.plan import PlanBase

GONE = torch.tensor([False])

# Three stages, the inner two as wide; the outermost is no wider than the first convolution.
CROSS = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 3,
    "norm_num_groups": 4,
    "attention_head_dim": [1, 2, 2],
    "transformer_layers_per_block": [1, 2, 2],
}
PLAIN = {
    "sample_size": 8,
    "attention_head_dim": 8,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 4,
}


@cache
def unet_run(name: str) -> DenseRun:
    from diffusers import UNet2DModel

    build = {
        "cross": lambda: unet(**CROSS),
        "uneven": lambda: unet(**CROSS | {"layers_per_block": [1, 2, 3], "attention_head_dim": [1, 2, 4]}),
        "plain": lambda: UNet2DModel(**PLAIN),
    }[name]
    torch.manual_seed(0)
    case = FamilyCase(name, build, 12, 20, ())
    model = randomise_(build())
    inputs = example_inputs(model, case)
    with torch.no_grad():
        return DenseRun(case, model, find_sites(model), inputs, run(model, inputs))


def assert_loads(export: StockExport, small: torch.nn.Module, dense) -> None:
    family = family_of(dense.model)
    stock = family.build(json.loads(json.dumps(export.config))).eval()
    assert type(stock) is type(dense.model)
    renamed = {export.renamed(key): value for key, value in small.state_dict().items()}
    renamed.pop(None, None)
    stock.load_state_dict(renamed)  # strict: nothing missing, nothing left over
    assert torch.equal(run(stock, dense.inputs), run(small, dense.inputs))


def layer(path: str) -> set[str]:
    """`down_blocks.1.2` or `up_blocks.1.2`: the holes that this layer leaves."""
    part, index = path.rsplit(".", 1)
    kind = "branch" if part.startswith("down") else "drop_skip"
    return {f"{part}.resnets.{index}:{kind}", f"{part}.attentions.{index}:wrapper"}


MIDDLE = {f"mid_block.resnets.{index}:branch" for index in range(2)} | {"mid_block.attentions.0:wrapper"}
INNERMOST = {"down_blocks.1.downsamplers.0:drop_resampler", "up_blocks.0.upsamplers.0:drop_resampler"}


def innermost(layers: int) -> set[str]:
    down = set().union(*(layer(f"down_blocks.2.{index}") for index in range(layers)))
    return INNERMOST | down.union(*(layer(f"up_blocks.0.{index}") for index in range(layers + 1)))


@cache
def base_of(name: str) -> PlanBase:
    return plan_base(unet_run(name).model)


def parted(dense: DenseRun, holes: set[str]) -> gp.PruningPlan:
    """The plan that leaves these holes; attentions that a stage does not have are left out."""
    keep, ops = {}, []
    for hole in sorted(holes):
        path, _, kind = hole.rpartition(":")
        if kind == "drop_skip":
            ops.append(replace_op(path, kind, {"channels": dense.model.get_submodule(path).out_channels}))
        elif kind == "drop_resampler":
            ops.append(replace_op(path, kind))
        elif hole in dense.sites:
            keep[hole] = GONE
    return gp.PruningPlan(base_of(dense.case.name), keep, ops=tuple(ops))


WRAPPERS = [f"{way}_blocks.{stage}.attentions.{{}}:wrapper" for way, stage in (("down", 1), ("up", 1))]

# Host, holes -> what the stock configuration must say.
PARTS = {
    "one layer of one stage": (
        "cross",
        layer("down_blocks.1.2") | layer("up_blocks.1.1"),
        {"layers_per_block": [3, 2, 3], "transformer_layers_per_block": [1, 2, 2]},
    ),
    "two layers of each stage": (
        "cross",
        set().union(*(layer(f"{way}_blocks.{i}.{j}") for way in ("down", "up") for i in range(3) for j in (1, 2))),
        {"layers_per_block": 1},
    ),
    "a layer in the middle of its stage": (
        "cross",
        layer("down_blocks.2.1") | layer("up_blocks.0.1"),
        {"layers_per_block": [3, 3, 2]},
    ),
    "the first layer, of equal width": (
        "cross",
        layer("down_blocks.2.0") | layer("up_blocks.0.2"),
        {"layers_per_block": [3, 3, 2]},
    ),
    "a layer, and blocks of those that stay": (
        "cross",
        layer("down_blocks.1.1")
        | layer("up_blocks.1.1")
        | {
            "up_blocks.1.attentions.3.transformer_blocks.0:block",
            "down_blocks.1.attentions.2.transformer_blocks.0:block",
        },
        {
            "layers_per_block": [3, 2, 3],
            "transformer_layers_per_block": [[1, 1, 1], [2, 1], [2]],
            "reverse_transformer_layers_per_block": [1, [2, 2, 1], [1, 1, 1, 1]],
        },
    ),
    "as many blocks of each wrapper of a stage": (
        "cross",
        {
            f"{path}.{index}.transformer_blocks.0:block"
            for path, count in (("down_blocks.1.attentions", 3), ("up_blocks.1.attentions", 4))
            for index in range(count)
        },
        {"transformer_layers_per_block": [1, 1, 2], "reverse_transformer_layers_per_block": None},
    ),
    "the middle": ("cross", MIDDLE, {"mid_block_type": None}),
    "the middle's attention and its first ResNet block": (
        "cross",
        {"mid_block.resnets.0:branch", "mid_block.attentions.0:wrapper"},
        {"mid_block_type": "UNetMidBlock2D"},
    ),
    "attention of a stage on the way down": (
        "cross",
        {WRAPPERS[0].format(index) for index in range(3)},
        {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"]},
    ),
    "the innermost stage, and the middle stays": (
        "cross",
        innermost(3),
        {"block_out_channels": (8, 16), "attention_head_dim": [1, 2], "transformer_layers_per_block": [1, 2]},
    ),
    "the innermost stage and the middle": (
        "uneven",
        innermost(3) | MIDDLE,
        {"layers_per_block": [1, 2], "mid_block_type": None, "up_block_types": ("CrossAttnUpBlock2D",) * 2},
    ),
    "a layer of each stage, unconditional": (
        "plain",
        set().union(*(layer(f"{way}_blocks.{i}.1") for way in ("down", "up") for i in range(3))),
        {"layers_per_block": 1},
    ),
    "the innermost stage, unconditional": ("plain", innermost(2), {"block_out_channels": (8, 16)}),
    "the middle, unconditional": ("plain", MIDDLE, {"mid_block_type": None}),
    "the middle's attention, unconditional": ("plain", {"mid_block.attentions.0:wrapper"}, {"add_attention": False}),
    "attention of a stage, unconditional": (
        "plain",
        {WRAPPERS[1].format(index) for index in range(3)},
        {"up_block_types": ["UpBlock2D", "UpBlock2D", "UpBlock2D"]},
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_unet_are_exported(name: str):
    host, holes, expected = PARTS[name]
    dense = unet_run(host)
    plan = parted(dense, holes)
    small = gp.cut(dense.copy(), plan)
    export = family_of(dense.model).stock_config(dense.model, dense.sites, plan.keep, plan.ops)
    assert export == family_of(small).stock_config(small, dense.sites, plan.keep, plan.ops)
    assert {key: export.config[key] for key in expected} == expected
    assert_loads(export, small, dense)
    model = dense.copy()
    with gp.attach_gates(model, plan):
        assert difference(run(model, dense.inputs), run(small, dense.inputs)) <= 1e-5
    assert difference(dense.output, run(small, dense.inputs)) > 1e-3  # the middle of a narrow U-Net says little


PARTIAL = {
    "a layer without its partner": ("cross", layer("down_blocks.1.2")),
    "a partner without its layer": ("cross", layer("up_blocks.1.1")),
    "a layer with the partner of another": ("cross", layer("down_blocks.1.2") | layer("up_blocks.1.2")),
    "a layer without its attention": ("cross", layer("down_blocks.1.2") | {"up_blocks.1.resnets.1:drop_skip"}),
    "the first layer, of another width": ("cross", layer("down_blocks.1.0") | layer("up_blocks.1.2")),
    "one of two ResNet blocks of the middle": ("cross", {"mid_block.resnets.1:branch"}),
    "all ResNet blocks of the middle": ("cross", MIDDLE - {"mid_block.attentions.0:wrapper"}),
    "attention of one layer": ("cross", {WRAPPERS[0].format(1)}),
    "all layers of a stage": ("cross", innermost(3) - INNERMOST),
    "resamplers alone": ("cross", INNERMOST),
    "a stage without its resamplers' partner": ("cross", innermost(3) - {"up_blocks.0.upsamplers.0:drop_resampler"}),
    "the innermost stage, and the middle has its heads": ("uneven", innermost(3)),
    "layers of one stage, unconditional": ("plain", layer("down_blocks.1.1") | layer("up_blocks.1.1")),
    "the middle's attention and a ResNet block, unconditional": (
        "plain",
        {"mid_block.attentions.0:wrapper", "mid_block.resnets.1:branch"},
    ),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_parts_that_no_stock_configuration_says(name: str):
    host, holes = PARTIAL[name]
    dense = unet_run(host)
    plan = parted(dense, holes)
    assert family_of(dense.model).stock_config(dense.model, dense.sites, plan.keep, plan.ops) is None


def test_other_operators_are_not_exported():
    dense = unet_run("cross")
    op = replace_op("down_blocks.0.resnets.0.conv1", "low_rank", {"rank": 2})
    assert family_of(dense.model).stock_config(dense.model, dense.sites, {}, [op]) is None


# Stage of three layers -> the sets of layers that can go, counted by hand. Where w of the 4 layers on the way up read
# the same skip, one of the w stays. The first layer stays where the width changes: in stage 1 downwards, in 0 upwards.
CHOICES = {0: 11, 1: 7, 2: 16}


@torch.no_grad()
@pytest.mark.parametrize("stage", CHOICES)
def test_all_layers_that_can_go_from_a_stage(stage: int):
    dense, exported = unet_run("cross"), []
    layers = [layer(f"down_blocks.{stage}.{i}") for i in range(3)] + [
        layer(f"up_blocks.{2 - stage}.{i}") for i in range(4)
    ]
    for gone in itertools.product((False, True), repeat=7):
        plan = parted(dense, set().union(*itertools.compress(layers, gone)))
        export = family_of(dense.model).stock_config(dense.model, dense.sites, plan.keep, plan.ops)
        if export is not None and any(gone):
            exported.append((plan, export))
    assert len(exported) == CHOICES[stage]
    for plan, export in exported[::4]:
        assert_loads(export, gp.cut(dense.copy(), plan), dense)
