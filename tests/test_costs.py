"""Costs: golden counts of full-size models, and predicted == counted after the real cut."""

from __future__ import annotations

import copy

import pytest
import torch
from stock_configs import BASE, SD15, SDXL, TINY
from tiny_hosts import HOSTS, sd_unet

import genprune as gp
from genprune.costs import dense_costs, site_costs
from genprune.cutting import plan_base
from genprune.errors import GenpruneError

GOLDEN = {
    "sd15": (SD15, 859_520_964, 401_636_720_640),
    "sdxl": (SDXL, 2_567_463_684, 3_380_618_199_040),
    "bk-sdm-base": (BASE, 579_384_964, 261_496_995_840),
    "bk-sdm-small": (BASE | {"mid_block_type": None}, 482_346_884, 255_447_203_840),
    "bk-sdm-tiny": (TINY, 323_384_964, 242_754_519_040),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_counts(name):
    from diffusers import UNet2DConditionModel

    config, params, macs = GOLDEN[name]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    costs = gp.count_costs(unet)
    assert (costs.params, costs.macs) == (params, macs)
    assert (costs.operating_point.height, costs.operating_point.text_length) == (config["sample_size"], 77)
    whole = costs.within("")
    assert (whole.params, whole.macs) == (params, macs)


def test_sd15_attention_matmuls():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        costs = gp.count_costs(UNet2DConditionModel(**SD15))
    own = sum(cost.macs for path, cost in costs.modules.items() if path.endswith((".attn1", ".attn2")))
    assert round(own / 1e9, 2) == 63.03  # layers.md 4.1: attention matmuls inside


def test_golden_counts_of_dits():
    from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

    with torch.device("meta"):
        dit = DiTTransformer2DModel(out_channels=8)  # DiT-XL/2 at 256 px
        alpha = PixArtTransformer2DModel(caption_channels=4096)  # PixArt-XL-2-1024-MS
        sigma = PixArtTransformer2DModel(caption_channels=4096, use_additional_conditions=False)
    costs = gp.count_costs(dit)
    # The paper's 118.64 G: it embeds timestep and class once, diffusers in each of 28 blocks and before the output.
    assert (costs.params, costs.macs) == (749_826_464, 118_666_838_016)
    embedding = 256 * 1152 + 1152 * 1152
    assert costs.macs - 28 * embedding == pytest.approx(118.64e9, rel=1e-3)
    assert costs.modules["transformer_blocks.0.norm1"].macs == -embedding  # the host's own call of what is inside
    assert costs.within("transformer_blocks.0").macs == costs.within("transformer_blocks.1").macs
    assert sum(part.macs for part in costs.modules.values()) == costs.macs
    for model, text, params, macs in (
        (alpha, 120, 611_349_152, 3_254_761_783_296),
        (sigma, 300, 610_856_096, 3_316_789_886_976),
    ):
        costs = gp.count_costs(model)
        assert (costs.params, costs.macs) == (params, macs)
        assert (costs.operating_point.height, costs.operating_point.text_length) == (128, text)


def test_a_dit_makes_squares_only():
    with pytest.raises(GenpruneError, match="squares only; expected one size, got height=16, width=8. Pass the same"):
        gp.count_costs(HOSTS["dit"](), height=16)


@pytest.mark.parametrize("host", HOSTS)
def test_params_are_the_models_and_the_target_is_untouched(host):
    model = HOSTS[host]().bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    costs = gp.count_costs(model)
    assert costs.params == sum(p.numel() for p in model.parameters())
    assert costs.macs > 0
    after = model.state_dict()
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.device.type == "cpu" for p in model.parameters())


@pytest.mark.parametrize("host", HOSTS)
def test_prediction_equals_the_cut(host):
    model = HOSTS[host]()
    costs = site_costs(model)
    for seed in range(2):
        keep = random_masks(costs.sites, seed, costs.sites.kinds())
        assert_predicts_cut(model, costs, keep)


@pytest.mark.parametrize("host", HOSTS)
def test_prediction_equals_the_cut_for_each_kind(host):
    model = HOSTS[host]()
    costs = site_costs(model)
    for kind in costs.sites.kinds():
        first = next(iter(costs.sites.of_kind(kind).values()))
        masks = random_masks(costs.sites, 0, (kind,)) | {first.name: torch.zeros(first.size, dtype=torch.bool)}
        assert_predicts_cut(model, costs, masks)


def random_masks(sites, seed, kinds):
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, site in sites.items():
        if site.kind in kinds and torch.rand((), generator=generator) < 0.7:
            chance = 0.8 if site.size == 1 else torch.rand((), generator=generator)
            masks[name] = torch.rand(site.size, generator=generator) < chance
    return masks


def assert_predicts_cut(model, costs, keep):
    small = copy.deepcopy(model)
    gp.cut(small, gp.PruningPlan(plan_base(model), keep))
    predicted, counted = costs.predict(keep), gp.count_costs(small)
    assert (predicted.params, predicted.macs) == (counted.params, counted.macs)
    assert counted.params == sum(p.numel() for p in small.parameters())


def test_a_cut_model_remembers_its_dense_costs():
    model = sd_unet()
    dense = gp.count_costs(model)
    sites = gp.find_sites(model)
    name = next(iter(sites.of_kind("neurons")))
    mask = torch.arange(sites[name].size) % 2 == 0
    gp.cut(model, gp.PruningPlan(plan_base(model), {name: mask}))
    assert gp.count_costs(model).params < dense.params
    assert dense_costs(model) == dense
    again = site_costs(model)
    keep = {name: torch.arange(again.sites[name].size) % 3 == 0}
    assert_predicts_cut(model, again, keep)


def test_gated_models_and_pipelines_count_the_same():
    model = sd_unet()
    plain = gp.count_costs(model)
    gates = {name: torch.ones(site.size) for name, site in gp.find_sites(model).items()}
    with gp.attach_gates(model, gates):
        assert gp.count_costs(model) == plain


def test_offloaded_models_count_the_same():
    from accelerate import cpu_offload

    model = sd_unet()
    plain = gp.count_costs(model)
    cpu_offload(model, execution_device="cpu")
    assert next(model.parameters()).device.type == "meta"
    assert gp.count_costs(model) == plain
    assert hasattr(model.conv_in, "_hf_hook") and model.conv_in.forward is not type(model.conv_in).forward


def test_units_do_not_count_twice():
    costs = site_costs(sd_unet())
    sites = costs.sites
    block = next(iter(sites.of_kind("block")))
    inside = {n: torch.zeros(s.size, dtype=torch.bool) for n, s in sites.items() if block in sites.ancestors(n)}
    gone = {block: torch.zeros(1, dtype=torch.bool)}
    assert costs.predict(gone) == costs.predict(gone | inside)
    unit = costs.unit(block)
    assert costs.total.within(sites[block].path) == unit


def test_operating_point_scales_macs_only():
    model = sd_unet()
    small, large = gp.count_costs(model, height=8, width=8), gp.count_costs(model, height=16, width=8)
    assert large.params == small.params
    assert large.macs > 1.9 * small.macs
    assert gp.count_costs(model, batch=2).macs == pytest.approx(2 * small.macs, rel=0.02)  # the text rows also double


def test_unknown_fields_and_models_are_refused():
    with pytest.raises(GenpruneError, match="has no 'hight', nearest name: 'height'; expected height"):
        gp.count_costs(sd_unet(), hight=8)
    with pytest.raises(GenpruneError, match="height=0 is no size"):
        gp.count_costs(sd_unet(), height=0)
    with pytest.raises(gp.UnsupportedModel, match="Linear is not a model that genprune can prune"):
        gp.count_costs(torch.nn.Linear(2, 2))
