"""A plan fits every fine-tune of its base: what does not touch the sites does not count."""

from __future__ import annotations

import pytest
import timm
import torch
from diffusers import UNet2DConditionModel

import genprune as gp
from genprune.cutting import plan_base
from genprune.errors import PlanMismatch

UNET = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "sample_size": 8,
}
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 4}


def unet(**changes) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**UNET | changes)


def vit(**changes):
    with torch.device("meta"):
        return timm.create_model("vit_tiny_patch16_224", **VIT | changes)


@pytest.mark.parametrize(
    "changes", [{"upcast_attention": None}, {"sample_size": 12}, {"dropout": 0.1}, {"in_channels": 9}]
)
def test_a_unet_plan_fits_fine_tunes(changes: dict):
    base, tuned = unet(), unet(**changes)
    plan = gp.make_plan(base, gp.Random(keep=0.8), operating_point={"text_length": 4}, progress=False)
    gp.cut(base, plan)
    gp.cut(tuned, plan)
    assert plan_base(tuned) == plan_base(base)


@pytest.mark.parametrize("changes", [{"num_classes": 7}, {"drop_path_rate": 0.1}])
def test_a_vit_plan_fits_fine_tunes(changes: dict):
    plan = gp.make_plan(vit(), gp.Random(keep=0.8), progress=False)
    assert gp.count_costs(gp.cut(vit(**changes), plan)).params < gp.count_costs(vit(**changes)).params


@pytest.mark.parametrize(
    "changes", [{"cross_attention_dim": 12}, {"layers_per_block": 2}, {"block_out_channels": (16, 64)}]
)
def test_another_structure_is_refused(changes: dict):
    plan = gp.make_plan(unet(), gp.Random(keep=0.8), operating_point={"text_length": 4}, progress=False)
    with pytest.raises(PlanMismatch, match="Make a plan for this model|make a plan for this model"):
        gp.cut(unet(**changes), plan)
