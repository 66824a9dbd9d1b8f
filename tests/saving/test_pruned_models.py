"""Models of diffusers: a cut model saves and reloads as its Pruned class, and never as anything else."""

from __future__ import annotations

import copy
import json
import pkgutil

import diffusers
import pytest
import torch
from cut_models import (
    DIFFUSERS_HOSTS,
    cut_model,
    dense,
    difference,
    no_pickle_in,
    plan_for,
    run,
    same_state,
    without_block,
)
from safetensors.torch import load_file, save_file

import genprune as gp
from genprune.cutting import applied_plan, plan_base, pruned_widths
from genprune.replacements import ScatteredLinear

WEIGHTS = "diffusion_pytorch_model.safetensors"
PLAN = "genprune_plan.safetensors"


@pytest.mark.parametrize("name", DIFFUSERS_HOSTS)
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_round_trip(name, low_cpu_mem_usage, tmp_path):
    model = cut_model(name)
    model.save_pretrained(tmp_path)
    no_pickle_in(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert type(loaded) is type(model) and isinstance(loaded, dense(name).__class__)
    same_state(loaded, model)
    assert difference(run(loaded), run(model)) < 1e-5  # same bits; other alignment in memory, other rounding
    assert applied_plan(loaded) == applied_plan(model)
    assert pruned_widths(loaded) == pruned_widths(model)
    assert plan_base(loaded) == plan_base(model)  # plans made on either are plans for both


@pytest.mark.parametrize("name", DIFFUSERS_HOSTS)
def test_the_config_alone_gives_every_shape(name):
    model = cut_model(name)
    config = json.loads(model.to_json_string())
    with torch.device("meta"):
        skeleton = type(model).from_config(config)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in skeleton.state_dict().items()} == shapes
    assert len(json.dumps(config["pruning"])) < 8192


@pytest.mark.parametrize("name", DIFFUSERS_HOSTS)
@pytest.mark.parametrize("make", [cut_model, without_block])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_stock_loader_raises(name, make, low_cpu_mem_usage, tmp_path):
    if name == "ddpm" and make is without_block:
        pytest.skip("UNet2DModel has no transformer blocks")
    make(name).save_pretrained(tmp_path)
    stock = type(dense(name))
    with pytest.raises((ValueError, RuntimeError), match="expected shape|size mismatch"):
        stock.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize("name", DIFFUSERS_HOSTS)
def test_dtype_shards_variant_and_device_map(name, tmp_path):
    model = cut_model(name)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*-of-*.safetensors"))) > 2
    same_state(type(model).from_pretrained(tmp_path / "shards"), model)
    same_state(type(model).from_pretrained(tmp_path / "shards", device_map="cpu"), model)
    half = copy.deepcopy(model).to(torch.bfloat16)
    same_state(type(model).from_pretrained(tmp_path / "shards", torch_dtype=torch.bfloat16), half)
    half.save_pretrained(tmp_path / "half", variant="bf16")
    assert (tmp_path / "half" / "diffusion_pytorch_model.bf16.safetensors").is_file()
    same_state(type(model).from_pretrained(tmp_path / "half", variant="bf16", torch_dtype=torch.bfloat16), half)


def test_saving_again_writes_the_same_files(tmp_path):
    model = cut_model("sd")
    model.save_pretrained(tmp_path / "a")
    loaded = gp.PrunedUNet2DConditionModel.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    for file in (WEIGHTS, PLAN):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    first, second = (json.loads((tmp_path / x / "config.json").read_text()) for x in "ab")
    assert second.pop("_name_or_path") == str(tmp_path / "a")  # diffusers notes where it loaded from
    assert first == second


def test_kept_units_of_scattered_layers_come_from_the_checkpoint(tmp_path):
    model = cut_model("flux", depth=False)
    model.save_pretrained(tmp_path)
    indices = [m.index for m in model.modules() if isinstance(m, ScatteredLinear)]
    assert any(not torch.equal(index, torch.arange(len(index))) for index in indices)
    for low in (True, False):
        loaded = gp.PrunedFluxTransformer2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=low)
        found = [m.index for m in loaded.modules() if isinstance(m, ScatteredLinear)]
        assert all(torch.equal(a, b) for a, b in zip(found, indices, strict=True))


def test_cutting_a_loaded_model_further_equals_cutting_on(tmp_path):
    model = cut_model("sd3")
    model.save_pretrained(tmp_path)
    loaded = gp.PrunedSD3Transformer2DModel.from_pretrained(tmp_path)
    later = plan_for(model, seed=5, depth=False)
    gp.cut(model, later)
    gp.cut(loaded, later)
    same_state(loaded, model)
    assert loaded.config["pruning"] == model.config["pruning"]
    assert applied_plan(loaded) == applied_plan(model)
    loaded.save_pretrained(tmp_path)
    same_state(gp.PrunedSD3Transformer2DModel.from_pretrained(tmp_path), model)


def test_class_names_are_file_format():
    names = ("UNet2DConditionModel", "UNet2DModel", "FluxTransformer2DModel", "SD3Transformer2DModel")
    for name in (*names, "DiTTransformer2DModel", "PixArtTransformer2DModel"):
        pruned = getattr(gp, f"Pruned{name}")
        assert pruned.__module__ == "genprune" and issubclass(pruned, getattr(diffusers, name))
        assert not {"forward", "__call__", "_forward_impl"} & vars(pruned).keys()
    assert gp.ModelMixin is diffusers.ModelMixin
    # A sub-package named like one of diffusers' pipeline packages would turn index entries into that name.
    ours = {module.name for module in pkgutil.iter_modules(gp.__path__)}
    assert not ours & set(dir(diffusers.pipelines))


def test_deep_copies_and_casts(tmp_path):
    model = cut_model("flux")
    before = run(model)
    twin = copy.deepcopy(model)
    assert type(twin) is type(model) and applied_plan(twin) == applied_plan(model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(run(model), before)
    assert model.to(torch.float64).dtype == torch.float64


def test_a_plan_that_keeps_everything_leaves_the_stock_class():
    model = dense("sd")
    before = copy.deepcopy(model)
    gp.cut(
        model,
        gp.PruningPlan(plan_base(model), {n: torch.ones(s.size).bool() for n, s in gp.find_sites(model).items()}),
    )
    assert type(model) is type(before) and "pruning" not in model.config
    same_state(model, before)


# ---- refusals: nothing changes, and the message says what to do ----------------------------------------------------


def test_a_users_own_subclass_is_refused_before_the_cut():
    class MyUNet(diffusers.UNet2DConditionModel):
        pass

    model = dense("sd")
    model.__class__ = MyUNet
    before = copy.deepcopy(model)
    with pytest.raises(gp.UnsupportedModel, match="MyUNet is a subclass.*expected exactly.*from_config"):
        gp.cut(model, plan_for(model))
    same_state(model, before)
    assert type(model) is MyUNet and not pruned_widths(model)


def test_gated_models_and_adapters_are_not_saved(tmp_path):
    model = cut_model("sd")
    with (
        gp.attach_gates(model, plan_for(model, depth=False)),
        pytest.raises(gp.PlanMismatch, match="gates are attached.*remove.*gp.cut"),
    ):
        model.save_pretrained(tmp_path / "x")
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(gp.PlanMismatch, match="an adapter is on.*fuse_lora"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("mine")
    model.unload_lora()
    with pytest.raises(gp.PlanMismatch, match="is a file"):
        model.save_pretrained(tmp_path / "file")


def _edited(folder, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("pruning"), "no 'pruning' entry.*dense"),
        (lambda c: c["pruning"].update(format_version=3), "format 3.*pip install -U genprune"),
        (lambda c: c.update(pruning=[1, 2]), "damaged.*format_version"),
        (lambda c: c["pruning"].update(widths="all"), "damaged"),
        (lambda c: c["pruning"]["widths"].update({"conv_in:heads": 1}), "names 'conv_in:heads'.*does not have"),
        (lambda c: c["pruning"]["widths"].update({"mid_block.resnets.0:channels": 99}), "keeps 99 of 8"),
        (lambda c: c["pruning"]["widths"].update({"mid_block.resnets.0:channels": -1}), "whole number"),
        (lambda c: c["pruning"]["widths"].update({"mid_block.resnets.0:channels": True}), "whole number"),
    ],
)
def test_damaged_pruning_entries(change, message, tmp_path):
    cut_model("sd", depth=False).save_pretrained(tmp_path)
    _edited(tmp_path, change)
    with pytest.raises(gp.PlanMismatch, match=message):
        gp.PrunedUNet2DConditionModel.from_pretrained(tmp_path)


def test_mixed_and_half_written_folders(tmp_path):
    load = gp.PrunedUNet2DConditionModel.from_pretrained
    model = cut_model("sd", depth=False)
    model.save_pretrained(tmp_path)
    site = next(iter(pruned_widths(model)))
    _edited(tmp_path, lambda c: c["pruning"]["widths"].update({site: c["pruning"]["widths"][site] - 1}))
    with pytest.raises((gp.PlanMismatch, ValueError), match="expected shape|half-written or mixed"):
        load(tmp_path)
    model.save_pretrained(tmp_path)
    cut_model("sd", seed=3, depth=False)._genprune_plan.save(tmp_path / PLAN)
    with pytest.raises(gp.PlanMismatch, match="half-written or mixed from two models"):
        load(tmp_path)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    weights.pop("conv_out.bias")
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    for low in (True, False):
        with pytest.raises(gp.PlanMismatch, match="lacks 1 tensors.*'conv_out.bias'"):
            load(tmp_path, low_cpu_mem_usage=low)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-100])
    with pytest.raises((OSError, ValueError), match="Unable to load weights"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "Pruned')
    with pytest.raises(OSError, match="not a valid JSON file"):
        load(tmp_path)


def test_a_missing_shard(tmp_path):
    cut_model("sd").save_pretrained(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises((OSError, ValueError), match="00002-of"):
        gp.PrunedUNet2DConditionModel.from_pretrained(tmp_path)


def test_without_its_plan_a_model_loads_but_is_not_cut_again(tmp_path):
    model = cut_model("sd")
    model.save_pretrained(tmp_path)
    (tmp_path / PLAN).unlink()
    loaded = gp.PrunedUNet2DConditionModel.from_pretrained(tmp_path)
    same_state(loaded, model)
    with pytest.raises(gp.PlanMismatch, match="plan of that cut is not with it"):
        gp.cut(loaded, plan_for(loaded, depth=False))


def test_a_failed_save_leaves_no_plan_of_another_model(tmp_path, monkeypatch):
    cut_model("sd", seed=0).save_pretrained(tmp_path)
    import safetensors.torch as writer

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "save_file", no_space)
    with pytest.raises(OSError, match="No space left"):
        cut_model("sd", seed=1).save_pretrained(tmp_path)
    assert not (tmp_path / PLAN).exists()


def test_save_model_replaces_the_folder_only_at_the_end(tmp_path, monkeypatch):
    first = cut_model("sd", seed=0)
    gp.save_model(first, tmp_path / "m")
    import safetensors.torch as writer

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(writer, "save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gp.save_model(cut_model("sd", seed=1), tmp_path / "m")
    same_state(gp.load_model(tmp_path / "m"), first)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
