"""Bare models by folder: timm's hub format with widths, strict on loading; dense models as well."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from cut_models import cut_model, dense, difference, no_pickle_in, plan_for, run, same_state, without_block
from safetensors.torch import load_file, save_file
from tiny_hosts import HOSTS

import genprune as gp
from genprune.cutting import applied_plan, plan_base
from genprune.slice_loading import load_cut


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("make", [cut_model, dense])
def test_round_trip(name, make, tmp_path):
    model = make(name)
    gp.save_model(model, tmp_path / "m")
    no_pickle_in(tmp_path)
    loaded = gp.load_model(tmp_path / "m")
    assert type(loaded) is type(model) and not loaded.training
    same_state(loaded, model)
    assert difference(run(loaded), run(model)) < 1e-5
    assert plan_base(loaded) == plan_base(model)
    assert applied_plan(loaded) == applied_plan(model)
    half = gp.load_model(tmp_path / "m", dtype=torch.bfloat16)
    same_state(half, model.to(torch.bfloat16))
    gp.save_model(loaded, tmp_path / "m")  # onto itself
    same_state(gp.load_model(tmp_path / "m"), loaded)


def test_timms_format(tmp_path):
    model = cut_model("vit")
    gp.save_model(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224" and config["num_classes"] == 5
    assert config["model_args"]["embed_dim"] == 24 and "mean" in config["pretrained_cfg"]
    assert config["pruning"]["format_version"] == 1
    gp.save_model(gp.load_model(tmp_path / "m"), tmp_path / "again")
    for file in ("model.safetensors", "genprune_plan.safetensors", "config.json"):
        assert (tmp_path / "m" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@pytest.mark.parametrize("make", [cut_model, without_block])
@pytest.mark.parametrize("strict", [True, False])
def test_stock_timm_raises_on_a_cut_folder(make, strict, tmp_path):
    gp.save_model(make("vit"), tmp_path / "m")
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True, pretrained_strict=strict)


def test_a_dense_folder_is_stock_and_takes_the_plan_of_the_model_in_memory(tmp_path):
    model = dense("vit")
    plan = plan_for(model)
    gp.save_model(model, tmp_path / "m")
    same_state(timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True), model)
    same_state(gp.cut(gp.load_model(tmp_path / "m"), plan), gp.cut(model, plan))


def test_a_loaded_timm_model_is_cut_further(tmp_path):
    model = cut_model("vit", depth=False)
    gp.save_model(model, tmp_path / "m")
    loaded = gp.load_model(tmp_path / "m")
    later = plan_for(model, seed=4)
    same_state(gp.cut(loaded, later), gp.cut(model, later))
    assert applied_plan(loaded) == applied_plan(model)


@pytest.mark.parametrize("name", ["sd", "vit"])
def test_an_old_plan_beside_dense_weights_says_nothing(name, tmp_path):
    gp.save_model(cut_model(name, depth=False), tmp_path)
    model = dense(name)
    if name == "vit":
        timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    else:
        model.save_pretrained(tmp_path)
    assert (tmp_path / "genprune_plan.safetensors").is_file()  # the hosts replace their own files only
    loaded = gp.load_model(tmp_path)
    same_state(loaded, model)
    assert applied_plan(loaded) is None
    if name == "sd":
        plan = plan_for(model)
        same_state(load_cut(tmp_path, plan), gp.cut(model, plan))


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_what_is_not_saved(tmp_path):
    from timm.models.vision_transformer import VisionTransformer

    bare = VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=3)
    with pytest.raises(gp.UnsupportedModel, match="names no timm architecture.*timm.create_model"):
        gp.save_model(bare, tmp_path / "m")
    model = cut_model("vit", depth=False)
    with gp.attach_gates(model, plan_for(model)), pytest.raises(gp.PlanMismatch, match="gates are attached"):
        gp.save_model(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(gp.PlanMismatch, match="a folder with other files"):
        gp.save_model(model, tmp_path / "thesis")
    with pytest.raises(gp.PlanMismatch, match="is a file"):
        gp.save_model(model, tmp_path / "thesis" / "chapter.txt")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"


def test_a_vit_that_its_configuration_no_longer_describes_is_not_saved(tmp_path):
    model = dense("vit")
    model.prune_intermediate_layers([0])
    with pytest.raises(gp.UnsupportedModel, match=r"'blocks\.1.*has shape none.*depth="):
        gp.save_model(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
    model = cut_model("vit", depth=False)
    model.reset_classifier(7)  # which timm's configuration does say
    gp.save_model(model, tmp_path / "m")
    same_state(gp.load_model(tmp_path / "m"), model)


def test_damaged_timm_folders(tmp_path):
    folder = tmp_path / "m"
    gp.save_model(cut_model("vit"), folder)
    config = json.loads((folder / "config.json").read_text())

    def fails(message):
        with pytest.raises(gp.PlanMismatch, match=message):
            gp.load_model(folder)

    site = next(iter(config["pruning"]["widths"]))
    widths = config["pruning"]["widths"] | {site: config["pruning"]["widths"][site] + 1}
    (folder / "config.json").write_text(json.dumps(config | {"pruning": {"format_version": 1, "widths": widths}}))
    fails("does not hold the weights|half-written or mixed")
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "pruning"}))
    fails("does not hold the weights that the config beside it describes")
    (folder / "config.json").write_text(json.dumps(config | {"pruning": {"format_version": 9, "widths": {}}}))
    fails("format 9.*Upgrade")
    (folder / "config.json").write_text(json.dumps(config)[:50])
    fails("not whole JSON")
    (folder / "config.json").write_text("{}")
    fails("neither a `_class_name`.*nor an `architecture`")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-10])
    fails("does not hold the weights")
    (folder / "model.safetensors").unlink()
    fails("is missing")
    (folder / "config.json").unlink()
    fails("has no config.json")
    folder = tmp_path / "nowhere"
    fails("is no folder")
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    fails("whole pipeline.*load_pipeline")


def _damaged(folder, change):
    config, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    match change:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "missing":
            weights.unlink()
        case "tensor":
            tensors = load_file(weights)
            tensors.pop("conv_out.bias")
            save_file(tensors, weights, metadata={"format": "pt"})
        case dict():
            config.write_text(json.dumps(json.loads(config.read_text()) | change))
        case tuple():
            config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k not in change}))


@pytest.mark.parametrize(
    ("make", "change", "error", "message"),
    [
        (cut_model, "truncated", gp.PlanMismatch, "does not load as a PrunedUNet2DConditionModel.*half-written"),
        (dense, "truncated", gp.PlanMismatch, "does not load as a UNet2DConditionModel.*half-written"),
        (dense, "missing", gp.PlanMismatch, r"no file named diffusion_pytorch_model\.safetensors"),
        (dense, "tensor", gp.PlanMismatch, "lacks 1 tensors.*'conv_out.bias'"),
        (cut_model, {"pruning": {"format_version": 1, "widths": {}}}, gp.PlanMismatch, "expected shape"),
        (cut_model, {"_class_name": "UNet2DConditionModel"}, gp.PlanMismatch, "expected PrunedUNet2DConditionModel"),
        (cut_model, {"_class_name": "PrunedMixin"}, gp.UnsupportedModel, "'PrunedMixin', which is a model neither"),
        (dense, {"_class_name": 5}, gp.PlanMismatch, "`_class_name`.* is 5"),
        (dense, {"_class_name": "DDIMScheduler"}, gp.UnsupportedModel, "'DDIMScheduler', which is a model neither"),
        (dense, {"block_out_channels": None}, gp.PlanMismatch, "TypeError.*whole config.json"),
        (dense, ("block_out_channels", "down_block_types"), gp.PlanMismatch, "ValueError.*whole config.json"),
    ],
)
def test_damaged_diffusers_folders(make, change, error, message, tmp_path):
    make("sd").save_pretrained(tmp_path)
    _damaged(tmp_path, change)
    with pytest.raises(error, match=message) as caught:
        gp.load_model(tmp_path)
    assert "ignore_mismatched_sizes" not in str(caught.value)


def test_a_diffusers_folder_without_one_shard(tmp_path):
    dense("sd").save_pretrained(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises(gp.PlanMismatch, match="00002-of"):
        gp.load_model(tmp_path)
