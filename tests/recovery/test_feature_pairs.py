"""Pairs of features are read off the models: maps of cuts, stock exports and BK-SDM's shapes."""

from __future__ import annotations

import copy

import pytest
import torch
from recovery_cases import removing, student_of
from tiny_hosts import dit, flux, sd3, sd_unet, vit
from tiny_pipelines import flux_pipeline

from genprune.errors import GenpruneError, NoMatchingSites, PlanMismatch
from genprune.recovery import feature_pairs
from genprune.recovery.taps import FeatureTaps
from genprune.stock import stock_model


def test_a_run_of_removed_blocks_pairs_with_its_end():
    teacher = vit()
    student = student_of(teacher, "blocks.1:block", "blocks.2:block")
    assert feature_pairs(student, teacher) == [("blocks.0", "blocks.2")]
    assert feature_pairs(student, teacher, pairing="same") == [("blocks.0", "blocks.0")]


def test_what_stands_before_the_first_survivor_has_no_pair():
    teacher = sd3()
    student = student_of(teacher, "transformer_blocks.0:block")
    expected = [("transformer_blocks.1", "transformer_blocks.1"), ("transformer_blocks.2", "transformer_blocks.2")]
    assert feature_pairs(student, teacher) == expected


def test_a_removed_first_block_of_a_dit_is_gone_although_its_embeddings_stay():
    teacher = dit()
    student = student_of(teacher, "transformer_blocks.0:block")
    assert [ours for ours, _ in feature_pairs(student, teacher)] == ["transformer_blocks.1", "transformer_blocks.2"]


def test_runs_end_at_the_end_of_their_list(tmp_path):
    teacher = flux_pipeline(tmp_path)
    student = student_of(teacher, "transformer_blocks.1:block", "single_transformer_blocks.0:block")
    assert feature_pairs(student, teacher) == [
        ("transformer_blocks.0", "transformer_blocks.1"),
        ("single_transformer_blocks.1", "single_transformer_blocks.1"),
    ]


def test_a_unet_pairs_its_down_and_up_blocks():
    teacher = sd_unet()
    student = student_of(teacher, "mid_block.attentions.0:wrapper", "down_blocks.1.resnets.0:branch")
    paths = ["down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1"]
    assert feature_pairs(student, teacher) == [(path, path) for path in paths]


def test_a_stock_export_pairs_by_its_plan():
    teacher = flux()
    plan = removing(teacher, "transformer_blocks.0:block", "single_transformer_blocks.1:block")
    student = stock_model(student_of(teacher, *plan.keep))
    assert len(student.transformer_blocks) == 1
    assert feature_pairs(student, teacher, plan=plan) == [
        ("transformer_blocks.0", "transformer_blocks.1"),
        ("single_transformer_blocks.0", "single_transformer_blocks.1"),
    ]
    with pytest.raises(PlanMismatch, match="1 blocks in the student and 2 in the teacher.*Pass plan="):
        feature_pairs(student, teacher)


# ---- the published shapes and maps ----------------------------------------------------------------------------------

SD15 = {
    "block_out_channels": (32, 64, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
}
BASE = SD15 | {"layers_per_block": 1}
SMALL = BASE | {"mid_block_type": None}
TINY = SMALL | {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
}
OUTER = ["down_blocks.0", "down_blocks.1", "down_blocks.2", "down_blocks.3"]
OUTER += ["up_blocks.0", "up_blocks.1", "up_blocks.2", "up_blocks.3"]


@pytest.mark.parametrize("shape", [BASE, SMALL], ids=["base", "small"])
def test_bk_sdm_base_and_small_give_the_published_map(shape):
    assert feature_pairs(sd_unet(**shape), sd_unet(**SD15)) == [(path, path) for path in OUTER]


def test_bk_sdm_tiny_gives_the_published_map():
    student, teacher = sd_unet(**TINY), sd_unet(**SD15)
    pairs = feature_pairs(student, teacher)
    assert pairs == [
        ("down_blocks.0", "down_blocks.0"),
        ("down_blocks.1", "down_blocks.1"),
        ("down_blocks.2.attentions.0.proj_out", "down_blocks.2.attentions.1.proj_out"),
        ("up_blocks.0", "up_blocks.1"),
        ("up_blocks.1", "up_blocks.2"),
        ("up_blocks.2", "up_blocks.3"),
    ]
    inputs = (torch.randn(1, 4, 16, 16), 5, torch.randn(1, 3, 24))
    shapes = []
    for model, side in ((student, 0), (teacher, 1)):
        with FeatureTaps(model, [pair[side] for pair in pairs]) as taps, torch.no_grad():
            taps.open()
            model(*inputs)
            shapes.append([[tuple(each.shape) for each in features] for features in taps.close()])
    assert shapes[0] == shapes[1] and all(len(each) == 1 for each in shapes[0])


# ---- given pairs, and refusals --------------------------------------------------------------------------------------


def test_given_pairs_are_taken_after_a_look():
    teacher = vit()
    student = student_of(teacher, "blocks.1:block")
    given = [("blocks.0.attn", "blocks.0.attn"), ("norm", "norm")]
    assert feature_pairs(student, teacher, pairs=given) == given
    with pytest.raises(
        NoMatchingSites, match="pairs names 'blocks.9', which is no module of the teacher.*nearest name: 'blocks"
    ):
        feature_pairs(student, teacher, pairs=[("blocks.0", "blocks.9")])
    with pytest.raises(GenpruneError, match="pairing='sam', nearest name: 'same'; expected one of"):
        feature_pairs(student, teacher, pairing="sam")


def test_no_pair_at_all_is_an_error():
    teacher = vit()
    student = student_of(teacher, *(f"blocks.{index}:block" for index in range(3)))
    with pytest.raises(NoMatchingSites, match="expected a model cut from it. Pass pairs=.*feature_weight=0"):
        feature_pairs(student, teacher)


# ---- taps -----------------------------------------------------------------------------------------------------------


def test_both_streams_of_a_joint_block_are_features():
    from recovery_cases import denoiser_batches

    model = flux().eval()
    inputs = denoiser_batches(model, count=1)[0][0]
    with FeatureTaps(model, ["transformer_blocks.0", "single_transformer_blocks.1"]) as taps, torch.no_grad():
        model(**inputs)
        assert taps.caught is None  # nothing is caught while they are closed
        taps.open()
        model(**inputs)
        joint, single = taps.close()
    text, image = inputs["encoder_hidden_states"].shape[1], inputs["hidden_states"].shape[1]
    assert [each.shape[1] for each in joint] == [text, image] == [each.shape[1] for each in single]
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("build", [sd_unet, flux], ids=["unet", "flux"])
def test_blocks_computed_again_in_the_backward_pass_add_nothing(build):
    from recovery_cases import denoiser_batches

    model = build().eval()
    inputs = denoiser_batches(model, count=1)[0][0]
    path = "up_blocks.0" if build is sd_unet else "transformer_blocks.0"
    inner = "up_blocks.1.attentions.0.transformer_blocks.0.attn1"
    inner = inner if build is sd_unet else "single_transformer_blocks.0.attn"
    gradients, calls = [], []
    for checkpointed in (False, True):
        copied = copy.deepcopy(model)
        if checkpointed:
            copied.enable_gradient_checkpointing()
        copied.get_submodule(inner).register_forward_hook(lambda *given: calls.append(1))
        with FeatureTaps(copied, [path, inner]) as taps:
            taps.open()
            copied(**inputs)
            features = taps.close()
            sum(each.square().mean() for tap in features for each in tap).backward()
            assert taps.caught is None
        gradients.append({name: p.grad for name, p in copied.named_parameters() if p.grad is not None})
    assert len(calls) == 3  # the block did run again
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)
