"""Presets: integers through JSON, the size they were made for, published settings."""

from __future__ import annotations

import json

import pytest
import timm
import torch

import genprune as gp
from genprune.tokens.presets import TokenPreset, preset_tokens


def vit(depth=6, image=48):
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", depth=depth, embed_dim=32, num_heads=2, img_size=image, patch_size=8, num_classes=5
    ).eval()


@pytest.fixture(scope="module")
def model():
    return vit()


@pytest.fixture(scope="module")
def preset(model):
    with gp.prune_tokens(model, gp.ZeroTPrune.published(keep=0.7)) as handle:
        return handle.preset()


def test_counts_come_back_as_the_same_integers(model, preset, tmp_path):
    """100 * 0.57 is 56.99...: only whole numbers say what was kept."""
    file = tmp_path / "preset.json"
    preset.save(file)
    read = TokenPreset.load(file)
    assert read == preset and all(type(count) is int for count in read.method.keep.values())
    x = torch.randn(2, 3, 48, 48)
    with gp.prune_tokens(model, gp.ZeroTPrune.published(keep=0.7)) as handle:
        counts, out = handle.counts, model(x)
    for given in (file, str(file), read):
        with gp.prune_tokens(model, given) as handle:
            assert handle.counts == counts == read.method.keep
            assert torch.equal(model(x), out)
            handle.set(keep=0.8)  # goes on as the method that it is


def test_it_says_what_it_was_made_for(preset):
    told = preset.to_json()
    assert (told["patches"], told["depth"], told["model"]) == (36, 6, "VisionTransformer")
    assert told["figures"]["keep"] == pytest.approx(0.7, abs=0.02) and told["figures"]["macs"] > 0


def test_another_image_size_takes_counts_in_proportion_and_says_so(preset):
    large = vit(image=96)
    with pytest.warns(UserWarning, match="made for 36 patches, this VisionTransformer has 144 .* in proportion"):
        handle = gp.prune_tokens(large, preset)
    assert handle.counts == {layer: 4 * count for layer, count in preset.method.keep.items()}


def test_another_depth_is_refused(preset):
    shallow = vit(depth=4)
    with pytest.raises(gp.PlanMismatch, match=r"for 6 layers .* has 4. Search one"):
        gp.prune_tokens(shallow, preset)
    assert not any(module._forward_hooks for module in shallow.modules())


def test_a_method_without_a_size_is_taken_from_a_file_too(model, tmp_path):
    file = tmp_path / "method.json"
    gp.ZeroTPrune(keep={2: 20}).save(file)
    with gp.prune_tokens(model, file) as handle:
        assert handle.counts == {2: 20}
    with pytest.raises(gp.PlanMismatch, match="holds a method without the size"):
        TokenPreset.load(file)


def test_keeping_everything_can_be_saved(model, tmp_path):
    with gp.prune_tokens(model, gp.ZeroTPrune(keep=1.0)) as handle:
        handle.preset().save(tmp_path / "all.json")
    x = torch.randn(1, 3, 48, 48)
    dense = model(x)
    with gp.prune_tokens(model, tmp_path / "all.json"):
        assert torch.equal(model(x), dense)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format_version": 2}, "has format 2, this genprune reads up to 1. Upgrade"),
        ({"patchs": 3}, "unknown .'patchs'., nearest name: 'patches'"),
        ({"depth": None}, "depth=None; expected a whole number"),
        ({"preset": "plan"}, "preset='plan'"),
    ],
)
def test_a_damaged_file_is_refused(preset, tmp_path, change, text):
    file = tmp_path / "preset.json"
    file.write_text(json.dumps({**preset.to_json(), **change}))
    with pytest.raises(gp.GenpruneError, match=text):
        TokenPreset.load(file)


def test_a_missing_file_names_the_nearest_published(model):
    with pytest.raises(gp.PlanMismatch, match="'deit-.9-.8-.6' cannot be read .*nearest name: 'deit-.9-.8-.7'"):
        gp.prune_tokens(model, "deit-.9-.8-.6")
    with pytest.raises(gp.GenpruneError, match="no published token preset 'deit'"):
        preset_tokens("deit")


def test_published_settings_give_the_published_token_counts():
    torch.manual_seed(0)
    twelve = timm.create_model("deit_tiny_patch16_224", embed_dim=24, num_heads=1, num_classes=5)
    counts = {}
    for name, preset in gp.token_presets().items():
        assert preset.source.startswith("published") and preset.patches == 196
        with gp.prune_tokens(twelve, preset) as handle:
            counts[name] = handle.counts
    assert counts["deit-.9-.8-.7"] == {2: 176, 5: 140, 8: 98}
    assert [1 + n for n in counts["diffrate-deit-s"].values()] == [
        *(197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3)
    ]
