"""What cannot be cut exactly is refused by name: the layer and the cause."""

from __future__ import annotations

import pytest
import torch
from family_cases import unet, vit
from torch import nn

from genprune.errors import NoMatchingSites, UnsupportedModel
from genprune.families import family_of, find_sites


def test_an_unknown_class_names_what_is_supported():
    with pytest.raises(UnsupportedModel, match="Linear is not a model .* supported: UNet2DConditionModel, .*Pass one"):
        find_sites(nn.Linear(2, 2))


def test_a_host_without_a_family_is_refused_by_name():
    import timm

    model = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1)
    with pytest.raises(UnsupportedModel, match="^Eva is not a model that genprune can prune; supported:"):
        find_sites(model)


def test_a_wrapped_model_says_which_one_to_pass():
    import timm

    with pytest.raises(UnsupportedModel, match="OptimizedModule wraps a UNet2D.*`model._orig_mod`, or compile after"):
        find_sites(torch.compile(unet()))
    name = "vit_tiny_patch16_224"
    features = timm.create_model(name, img_size=32, depth=2, features_only=True, out_indices=(0, 1))
    with pytest.raises(UnsupportedModel, match="FeatureGetterNet wraps a VisionTransformer.*Pass `model.model`.$"):
        find_sites(features)


def test_one_kind_may_be_a_plain_string():
    model = vit()
    assert list(find_sites(model, "heads")) == list(find_sites(model, ("heads",)))
    with pytest.raises(NoMatchingSites, match="no site of kind 'haeds' .*it has heads"):
        find_sites(model, "haeds")


def test_a_norm_between_heads_and_their_consumer_refuses_the_heads_alone():
    sites = find_sites(vit(scale_attn_norm=True))
    assert sites.kinds() == ("neurons", "branch", "block")
    with pytest.raises(
        NoMatchingSites, match=r"'blocks.0.attn:heads' cannot be cut: 'blocks.0.attn.norm' \(LayerNorm\)"
    ):
        sites["blocks.0.attn:heads"]
    assert "refused    blocks.1.attn:heads" in str(sites)


def test_a_norm_between_neurons_and_their_consumer_refuses_the_neurons_alone():
    sites = find_sites(vit(scale_mlp_norm=True))
    assert sites.kinds() == ("heads", "branch", "block")
    with pytest.raises(NoMatchingSites, match=r"'blocks.0.mlp.norm' \(LayerNorm\) .* Pass another site"):
        sites["blocks.0.mlp:neurons"]


def test_differential_attention_keeps_its_heads_and_may_go_as_a_branch():
    sites = find_sites(vit(attn_layer="diff"))
    assert "heads" not in sites.kinds() and "blocks.0.attn:branch" in sites
    assert "computed by DiffAttention" in sites.refused["blocks.0.attn:heads"]


def test_blocks_that_are_unknown_refuse_the_model():
    from timm.models.vision_transformer import ParallelScalingBlock

    with pytest.raises(
        UnsupportedModel, match="nothing of this VisionTransformer .*'blocks.0:block': .*ParallelScaling"
    ):
        find_sites(vit(block_fn=ParallelScalingBlock))


def test_a_subclass_with_a_forward_of_its_own_is_unknown():
    from timm.models.vision_transformer import Block

    class Doubled(Block):
        def forward(self, x, attn_mask=None, is_causal=False):
            return 2 * super().forward(x)

    with pytest.raises(UnsupportedModel, match="it is a Doubled; exact are timm's Block and ResPostBlock"):
        find_sites(vit(block_fn=Doubled))


def test_shared_key_heads_are_refused():
    from family_cases import partial_class
    from timm.layers import AttentionRope

    grouped = partial_class(AttentionRope, {"qkv_fused": False, "num_kv_heads": 2})
    assert (
        find_sites(vit(attn_layer=grouped)).refused["blocks.0.attn:heads"] == "2 key heads are shared by 4 query heads"
    )


def test_a_norm_across_heads_refuses_a_diffusers_model():
    model = unet()
    attention = model.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.norm_q = nn.LayerNorm(attention.to_q.out_features)
    with pytest.raises(
        UnsupportedModel, match="attn1.norm_q' normalises 32 features, across heads of 8; expected a norm"
    ):
        find_sites(model)


def test_an_image_prompt_adapter_is_refused():
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    model = unet()
    attention = model.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.set_processor(IPAdapterAttnProcessor2_0(hidden_size=32, cross_attention_dim=12))
    with pytest.raises(
        UnsupportedModel, match=r"own weights \(IPAdapterAttnProcessor2_0.*pipe.unload_ip_adapter\(\) first"
    ):
        find_sites(model)


def test_a_timm_configuration_loads_no_weights_and_imports_only_layers():
    family = family_of(vit())
    config = family.config(vit())
    unsafe = config | {"model_args": {"checkpoint_path": "weights.bin"}}
    with pytest.raises(
        UnsupportedModel, match=r"hold \['checkpoint_path'\]; expected arguments of the architecture only"
    ):
        family.build(unsafe)
    loader = {"partial": "timm.models._helpers:load_checkpoint", "keywords": {"checkpoint_path": "weights.bin"}}
    with pytest.raises(UnsupportedModel, match="expected a name, a number, or a class of timm"):
        family.build(config | {"model_args": {"mlp_layer": loader}})


def test_a_vit_from_its_class_can_be_cut_but_not_built_again():
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    family = family_of(model)
    assert len(find_sites(model)) == 5
    with pytest.raises(UnsupportedModel, match="names no timm architecture.*Build it with timm.create_model"):
        family.build(family.config(model))
