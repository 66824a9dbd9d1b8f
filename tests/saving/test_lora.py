"""LoRAs: sliced by the plan they equal LoRA-then-cut; unsliced they are refused, and the model is as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from cut_models import cut_model, dense, difference, inputs, plan_for, run, same_state
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from tiny_hosts import HOSTS
from tiny_pipelines import flux_pipeline, sd_pipeline

import genprune as gp

_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TARGETS = {
    "sd": [*_ATTENTION, "proj", "net.2", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "proj_in"],
    "sdxl": [*_ATTENTION, "net.0.proj", "net.2", "proj_out"],
    "flux": [*_ATTENTION, "add_q_proj", "to_add_out", "net.0.proj", "net.2", "proj_mlp", "proj_out", "norm.linear",
             "norm1.linear", "norm1_context.linear"],
    "sd3": [*_ATTENTION, "add_q_proj", "to_add_out", "net.0.proj", "net.2", "norm1.linear"],
}  # fmt: skip


def prefix_of(name: str) -> str:
    return "unet" if name in ("sd", "sdxl") else "transformer"


def lora_and_fused(name: str):
    """A random LoRA of the dense model by PEFT's names, and the dense model with it merged in."""
    model = dense(name)
    model.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=TARGETS[name]))
    torch.manual_seed(4)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    tensors = get_peft_model_state_dict(model, adapter_name="default")
    tensors = {f"{prefix_of(name)}.{key}": value.detach().clone() for key, value in tensors.items()}
    model.fuse_lora()
    model.unload_lora()
    return tensors, model


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("depth", [False, True])
def test_adapted_equals_lora_then_cut(name, depth):
    lora, fused = lora_and_fused(name)
    model = dense(name)
    plan = plan_for(model, seed=1, depth=depth)
    given = inputs(model)
    gp.cut(fused, plan)
    gp.cut(model, plan)
    expected, plain = run(fused, given), run(model, given)
    assert difference(plain, expected) > 1e-2  # the LoRA is seen
    with torch.device("meta"):
        skeleton = HOSTS[name]()
    adapted = gp.adapt_lora(lora, plan, skeleton)
    for other in (gp.adapt_lora(lora, model), gp.adapt_lora(lora, plan, dict(skeleton.config))):
        assert list(other) == list(adapted)
        assert all(torch.equal(other[key], adapted[key]) for key in adapted)
    before = copy.deepcopy(model)
    with pytest.raises(gp.PlanMismatch, match=r"gp\.adapt_lora"):
        model.load_lora_adapter(lora, prefix=prefix_of(name))
    same_state(model, before)
    model.load_lora_adapter(adapted, prefix=prefix_of(name))
    assert difference(run(model, given), expected) < 1e-5
    twin = copy.deepcopy(model)
    model.fuse_lora()
    assert difference(run(model, given), expected) < 1e-5
    assert difference(run(twin, given), expected) < 1e-5
    twin.unload_lora()
    same_state(twin, before)


def test_all_key_formats_slice_alike():
    lora, _ = lora_and_fused("sd")
    model = cut_model("sd", seed=1, depth=False)
    expected = list(gp.adapt_lora(lora, model).values())
    for down, up in (("lora_down", "lora_up"), ("lora.down", "lora.up"), ("lora_A.default", "lora_B.default")):
        named = {k.replace("lora_A", down).replace("lora_B", up): v for k, v in lora.items()}
        named |= {k.split(".lora")[0] + ".alpha": torch.tensor(3.0) for k in lora}
        adapted = gp.adapt_lora(named, model)
        assert all(torch.equal(a, b) for a, b in zip((v for k, v in adapted.items() if "alpha" not in k), expected))
        assert sum("alpha" in key for key in adapted) == len(expected) // 2
    bare = {key.removeprefix("unet."): value for key, value in lora.items()} | {
        "text_encoder.x.lora_A.weight": torch.ones(1)
    }
    assert "text_encoder.x.lora_A.weight" in gp.adapt_lora(bare, model)
    old = {k.replace(".to_q.lora_A", ".processor.to_q_lora.down"): v for k, v in lora.items() if ".to_q.lora_A" in k}
    assert [v.shape for v in gp.adapt_lora(old, model).values()] == [
        v.shape for k, v in gp.adapt_lora(lora, model).items() if ".to_q.lora_A" in k
    ]


def test_kohya_names_and_alphas(tmp_path):
    lora, _ = lora_and_fused("sd")
    kohya = {}
    for name, value in lora.items():
        layer, _, part = name.removeprefix("unet.").partition(".lora_")
        if "attentions" in layer and ("to_" in layer or "net" in layer):
            stem = f"lora_unet_{layer.replace('.', '_')}"
            kohya[f"{stem}.lora_{'down' if part[0] == 'A' else 'up'}.weight"] = value
            kohya[f"{stem}.alpha"] = torch.tensor(6.0)
    pipe = sd_pipeline(tmp_path)
    pipe.unet = dense("sd")
    plan = plan_for(pipe.unet, seed=1)
    pipe.load_lora_weights(dict(kohya))
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    expected = run(gp.cut(pipe.unet, plan))
    pipe.unet = gp.cut(dense("sd"), plan)
    pipe.load_lora_weights(gp.adapt_lora(kohya, pipe))
    assert difference(run(pipe.unet), expected) < 1e-5
    with pytest.raises(gp.PlanMismatch, match="not in diffusers' format.*save_lora_weights"):
        gp.adapt_lora(
            {"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": torch.ones(1, 1)}, cut_model("sd3")
        )


def test_alphas_in_a_files_metadata(tmp_path):
    model = dense("flux")
    model.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_out.0"]))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_lora_adapter(tmp_path, weight_name="lora.safetensors")
    model.fuse_lora()
    model.unload_lora()
    plan = plan_for(dense("flux"), depth=False)
    expected = run(gp.cut(model, plan))
    cut = gp.cut(dense("flux"), plan)
    cut.load_lora_adapter(gp.adapt_lora(tmp_path / "lora.safetensors", cut), prefix=None)
    assert difference(run(cut), expected) < 1e-5


def test_a_lora_trained_on_the_cut_model_loads(tmp_path):
    model = cut_model("flux", seed=1)
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "norm1.linear", "net.2"]))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    expected = run(model)
    model.save_lora_adapter(tmp_path)
    fresh = cut_model("flux", seed=1)
    fresh.load_lora_adapter(tmp_path, prefix=None)
    assert difference(run(fresh), expected) < 1e-6
    assert difference(run(cut_model("flux", seed=1)), expected) > 1e-3


def test_pipelines_refuse_a_base_lora_and_take_an_adapted_one(tmp_path):
    for name, make in (("sd", sd_pipeline), ("flux", flux_pipeline)):
        pipe = make(tmp_path)
        slot = prefix_of(name)
        setattr(pipe, slot, dense(name))
        lora, _ = lora_and_fused(name)
        gp.cut(pipe, plan_for(getattr(pipe, slot), seed=1, depth=False))
        model = getattr(pipe, slot)
        before = copy.deepcopy(model)
        adapted = gp.adapt_lora(lora, pipe)
        narrow = {k: v[:, :-4] if "to_out.0.lora_A" in k else v for k, v in adapted.items()}
        for wrong in (lora, narrow):  # diffusers would widen Flux's layers, or pad the LoRA, without a word
            with pytest.raises(gp.PlanMismatch, match=r"another model, most likely the dense base.*gp\.adapt_lora"):
                pipe.load_lora_weights(wrong)
            same_state(model, before)
        pipe.load_lora_weights(adapted)
        assert difference(run(model), run(before)) > 1e-3
        pipe.unload_lora_weights()
        same_state(model, before)


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_hosts_that_only_peft_adapts(name):
    """diffusers gives DiT and PixArt no `load_lora_adapter`: their LoRAs are PEFT's."""
    config = LoraConfig(r=3, lora_alpha=3, target_modules=[*_ATTENTION, "net.0.proj", "net.2"])
    wrapped = get_peft_model(dense(name), config)
    torch.manual_seed(4)
    for key, parameter in wrapped.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    lora = {key: value.detach().clone() for key, value in get_peft_model_state_dict(wrapped).items()}
    fused, model = wrapped.merge_and_unload(), dense(name)
    plan = plan_for(model, seed=1, depth=False)
    given = inputs(model)
    expected, plain = run(gp.cut(fused, plan), given), run(gp.cut(model, plan), given)
    assert difference(plain, expected) > 1e-2  # the LoRA is seen
    adapted = gp.adapt_lora(lora, model)
    wrapped = get_peft_model(model, config)
    with pytest.raises(RuntimeError, match="size mismatch"):
        set_peft_model_state_dict(wrapped, lora)
    set_peft_model_state_dict(wrapped, adapted)
    assert difference(run(model, given), expected) < 1e-5


def three_blocks():
    """A tiny Flux of three double blocks, every weight random."""
    model = HOSTS["flux"]()
    model = type(model).from_config(dict(model.config) | {"num_layers": 3}).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def test_for_a_stock_export_the_layers_are_renumbered(tmp_path):
    config = LoraConfig(r=3, lora_alpha=3, target_modules=TARGETS["flux"])
    fused, model = three_blocks(), three_blocks()
    fused.add_adapter(config)
    torch.manual_seed(4)
    for key, parameter in fused.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    lora = get_peft_model_state_dict(fused, adapter_name="default")
    lora = {f"transformer.{key}": value.detach().clone() for key, value in lora.items()}
    fused.fuse_lora()
    fused.unload_lora()
    site = "transformer_blocks.1:block"
    plan = gp.PruningPlan(gp.plan_base(model), {site: torch.zeros(1, dtype=torch.bool)})
    gp.cut(fused, plan)
    gp.export_stock(gp.cut(model, plan), tmp_path / "stock")
    stock = gp.load_model(tmp_path / "stock")
    given = inputs(fused)
    expected = run(fused, given)
    assert difference(run(stock, given), expected) > 1e-2  # the LoRA is seen
    adapted = gp.adapt_lora(lora, model, for_stock=True)
    assert not any("transformer.transformer_blocks.2." in key for key in adapted)
    legacy = {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for k, v in lora.items()}
    assert list(gp.adapt_lora(legacy, model, for_stock=True)) == [
        key.replace("lora_A", "lora.down").replace("lora_B", "lora.up") for key in adapted
    ]
    stock.load_lora_adapter(adapted, prefix="transformer")
    assert difference(run(stock, given), expected) < 1e-5


def test_for_stock_needs_a_plan_that_a_stock_configuration_says():
    lora, _ = lora_and_fused("flux")
    with pytest.raises(gp.UnsupportedModel, match="sites are in the way"):
        gp.adapt_lora(lora, cut_model("flux"), for_stock=True)


def test_nested_scales_on_the_cut_unet_equal_the_stock_ones(tmp_path):
    """With a plan that touches no attention the LoRA is the same, and so are the expanded scales."""
    plan = plan_for(dense("sd"), depth=False)
    plan = gp.PruningPlan(plan.base, {n: m for n, m in plan.keep.items() if n.endswith(":channels")})
    lora, _ = lora_and_fused("sd")
    lora = {k: v for k, v in lora.items() if ".attn" in k}
    scales = {"unet": {"down": {"block_0": 0.3}, "up": 0.6}}
    found = []
    for model in (dense("sd"), gp.cut(dense("sd"), plan)):
        pipe = sd_pipeline(tmp_path)
        pipe.unet = model
        pipe.load_lora_weights(dict(lora), adapter_name="style")
        pipe.set_adapters("style", scales)
        found.append({n: m.scaling["style"] for n, m in model.named_modules() if hasattr(m, "scaling")})
    assert found[0] == found[1] and set(found[0].values()) == {0.3, 0.6, 1.0}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda lora: {"text_encoder.x.lora_A.weight": torch.ones(1)}, gp.NoMatchingSites, "none of the 1 entries"),
        (lambda lora: {}, gp.NoMatchingSites, "none of the 0 entries"),
        (lambda lora: {k.replace("to_q", "to_qq"): v for k, v in lora.items()}, gp.PlanMismatch, "names no layer of"),
        (lambda lora: {k: v[..., :-1] for k, v in lora.items() if "lora_A" in k}, gp.PlanMismatch, "adapted already"),
        (
            lambda lora: {k.replace("lora_A", "lokr_w1"): v for k, v in lora.items()},
            gp.PlanMismatch,
            "cannot be sliced",
        ),
        (lambda lora: {k + "_magnitude": v for k, v in lora.items()}, gp.PlanMismatch, "cannot be sliced"),
    ],
)
def test_what_is_no_lora_of_the_base_is_refused(change, error, message):
    lora, _ = lora_and_fused("sd3")
    with pytest.raises(error, match=message):
        gp.adapt_lora(change(lora), cut_model("sd3"))


def test_wrong_plans_and_bases(tmp_path):
    lora, _ = lora_and_fused("flux")
    plan = plan_for(dense("flux"))
    with pytest.raises(gp.PlanMismatch, match="another configuration"):
        gp.adapt_lora(lora, plan, dict(dense("flux").config) | {"num_layers": 3})
    with pytest.raises(gp.PlanMismatch, match="a plan alone"):
        gp.adapt_lora(lora, plan)
    with pytest.raises(gp.PlanMismatch, match="was not cut"):
        gp.adapt_lora(lora, dense("flux"))
    cut = cut_model("flux")
    del cut._genprune_plan
    with pytest.raises(gp.PlanMismatch, match="the plan is not with it"):
        gp.adapt_lora(lora, cut)
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 20)
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(gp.PlanMismatch, match="cannot be read as a safetensors file"):
        gp.adapt_lora(tmp_path / "broken.safetensors", cut_model("flux"))
    with pytest.raises(gp.PlanMismatch, match="names no layer|cannot be sliced"):
        gp.adapt_lora(tmp_path / "other.safetensors", cut_model("flux"))
