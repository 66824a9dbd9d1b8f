"""A router's folder: the same routes in a fresh process, and nothing of another router passes for a part of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from router_cases import WORDS, small_router
from safetensors.torch import load_file, save_file
from sentence_cases import SCENES, sentence_folder
from torch import nn

import genprune as gp
from genprune.cutting import plan_base
from genprune.routers import Expert, PromptRouter, TransformersEncoder, load_router
from genprune.routers.architecture import ArchitectureSpace
from genprune.routers.encoders import PooledTextEncoder
from genprune.routers.familiarity import Familiarity
from genprune.routers.fingerprints import weights_fingerprint
from genprune.routers.predictor import ArchitecturePredictor

TESTS = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny_pipelines.sd_pipeline(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def router(pipe):
    familiarity = Familiarity.of(PooledTextEncoder(pipe).encode([*WORDS, *SCENES]))
    made = {"weights_fingerprint": weights_fingerprint(pipe.unet), "familiarity": familiarity, "shift": 0.25}
    made["bias"] = torch.tensor([0.1, -0.1, 0.0], dtype=torch.float64)
    return small_router(pipe, 3, **made, made_by={"method": "aptp"})


@pytest.fixture(scope="module")
def saved(router, tmp_path_factory):
    return router.save_pretrained(tmp_path_factory.mktemp("saved") / "router")


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "router"))


def edited(folder: Path, **changes) -> None:
    path = folder / "router_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def fresh(code: str) -> str:
    """What code prints in a new interpreter."""
    start = f"import sys; sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]\n"
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# ---- round trips ----------------------------------------------------------------------------------------------------


def test_everything_comes_back(router, saved, pipe):
    for again in (PromptRouter.from_pretrained(saved, pipe=pipe), load_router(saved, encoder=router.encoder)):
        assert again.route([*WORDS, *SCENES]) == router.route([*WORDS, *SCENES])
        assert again.plans == router.plans and again.usage == router.usage
        assert torch.equal(again.codes, router.codes) and torch.equal(again.bias, router.bias)
        assert (again.base, again.training, again.made_by) == (router.base, router.training, router.made_by)
        assert (again.shift, again.weights_fingerprint) == (0.25, router.weights_fingerprint)
        assert again.familiarity.floor == router.familiarity.floor
        assert torch.equal(again.familiarity.embeddings, router.familiarity.embeddings)
        assert again.space.to_json() == router.space.to_json()


def test_a_fresh_process_routes_alike(router, saved, tmp_path):
    """Another order, another seed, other batches, and a pipeline that was loaded there."""
    code = f"""
import json, torch, pathlib, tiny_pipelines, genprune as gp
torch.manual_seed(99)
pipe = tiny_pipelines.sd_pipeline(pathlib.Path({str(tmp_path)!r}))
router = gp.routers.PromptRouter.from_pretrained({str(saved)!r}, pipe=pipe)
router.check_base(pipe.unet)
prompts = {WORDS!r}[::-1]
print(json.dumps([[router.route([p]).experts[0] for p in prompts], router.route(prompts).similarities.tolist()]))
"""
    experts, similarities = json.loads(fresh(code))
    routes = router.route(WORDS[::-1])
    assert tuple(experts) == routes.experts and len(set(experts)) > 1
    assert similarities == routes.similarities.tolist()  # to the bit: one machine, one prompt at a time


def test_the_sentence_encoder_is_found_again_by_its_folder(pipe, tmp_path):
    encoder = TransformersEncoder(sentence_folder(tmp_path / "encoder"), max_length=12)
    space = ArchitectureSpace.of(pipe)
    torch.manual_seed(0)
    predictor = ArchitecturePredictor(encoder.dim, space.lengths)
    embeddings = encoder.encode(SCENES)
    predictor.standardise(embeddings)
    plans = small_router(pipe, 2).plans
    codes = predictor(embeddings[[0, 40]]).detach()
    router = PromptRouter(encoder, space, predictor, codes, [Expert(p, 0.5) for p in plans], base=plan_base(pipe.unet))
    folder = router.save_pretrained(tmp_path / "router")
    again = load_router(folder)
    assert again.route(SCENES) == router.route(SCENES) and again.encoder.max_length == 12
    (tmp_path / "encoder").rename(tmp_path / "moved")
    with pytest.raises(gp.PlanMismatch, match=r"reads prompts with '.*encoder', which cannot be loaded.*encoder="):
        load_router(folder)
    assert load_router(folder, encoder=tmp_path / "moved").route(SCENES) == router.route(SCENES)  # and its max_length
    with pytest.raises(gp.PlanMismatch, match="has weights .*Pass that one as encoder="):
        load_router(folder, encoder=sentence_folder(tmp_path / "other", seed=1))
    with pytest.raises(gp.PlanMismatch, match="has kind 'pooled'"):
        load_router(folder, encoder=PooledTextEncoder(pipe))


def test_loading_draws_nothing_at_random(saved, pipe):
    before = torch.random.get_rng_state()
    load_router(saved, pipe=pipe)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_router_of_a_transformer_comes_back(tmp_path):
    pipe = tiny_pipelines.flux_pipeline(tmp_path)
    router = small_router(pipe, 2)
    again = load_router(router.save_pretrained(tmp_path / "router"), pipe=pipe)
    assert again.route(WORDS) == router.route(WORDS) and again.plans == router.plans
    again.check_base(pipe.transformer)


def tuned(router, folder: Path, count: int = 2) -> PromptRouter:
    """The first expert with a LoRA, the second with weights."""
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.ones(2)}, folder / "lora.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "tuned.safetensors")
    experts = list(router.experts)
    experts[0] = dataclasses.replace(experts[0], lora=folder / "lora.safetensors")
    experts[1] = dataclasses.replace(experts[1], weights=folder / "tuned.safetensors")
    return router.with_experts(experts)


def test_fine_tuned_experts_travel_with_the_router(router, pipe, tmp_path):
    folder = tuned(router, tmp_path / "files").save_pretrained(tmp_path / "router")
    shutil.rmtree(tmp_path / "files")
    again = load_router(folder, pipe=pipe)
    assert again.experts[0].lora == folder / "experts/00/pytorch_lora_weights.safetensors"
    assert again.experts[1].weights == folder / "experts/01/weights.safetensors"
    assert (again.experts[0].weights, again.experts[1].lora, again.experts[2].lora) == (None, None, None)
    assert torch.equal(load_file(again.experts[0].lora)["a"], torch.ones(2))
    assert again.save_pretrained(folder) == folder  # into its own place
    assert torch.equal(load_file(load_router(folder, pipe=pipe).experts[1].weights)["b"], torch.zeros(3))


def test_nothing_in_the_folder_is_unpickled(router, tmp_path):
    folder = tuned(router, tmp_path / "files").save_pretrained(tmp_path / "router")
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_a_failed_save_leaves_what_was_there(router, saved, pipe, tmp_path):
    folder = tmp_path / "router"
    router.save_pretrained(folder)
    gone = tuned(router, tmp_path / "files")
    (tmp_path / "files" / "lora.safetensors").unlink()
    with pytest.raises(gp.PlanMismatch, match="expert 0 has its fine-tuned weights at .*where no file is"):
        gone.save_pretrained(folder)
    assert load_router(folder, pipe=pipe).route(WORDS) == router.route(WORDS)
    assert not list(tmp_path.glob(".router*"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(gp.PlanMismatch, match="folder with other files; expected a new folder or one of a router"):
        router.save_pretrained(tmp_path / "mine")


# ---- never a silently wrong expert ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plan.json", "plan.safetensors", ""])
def test_a_missing_expert_is_named(folder, pipe, name):
    gone = folder / "experts" / "01" / name
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(gp.PlanMismatch, match="expert 1 lacks '.*experts/01/plan.*Fetch the router's folder anew"):
        load_router(folder, pipe=pipe)


def test_swapped_experts_are_refused(folder, pipe):
    experts = folder / "experts"
    (
        (experts / "00").rename(experts / "x"),
        (experts / "01").rename(experts / "00"),
        (experts / "x").rename(experts / "01"),
    )
    with pytest.raises(gp.PlanMismatch, match=r"experts/00/plan.json' is another file than the router was saved with"):
        load_router(folder, pipe=pipe)


def test_the_expert_of_another_router_is_refused(folder, pipe, tmp_path):
    other = small_router(pipe, 2).save_pretrained(tmp_path / "other")
    shutil.rmtree(folder / "experts/02")
    shutil.copytree(other / "experts/00", folder / "experts/02")
    with pytest.raises(gp.PlanMismatch, match="experts/02/plan.json' is another file"):
        load_router(folder, pipe=pipe)


def test_fine_tuned_weights_are_the_ones_that_were_saved(router, pipe, tmp_path):
    folder = tuned(router, tmp_path / "files").save_pretrained(tmp_path / "router")
    lora = folder / "experts/00/pytorch_lora_weights.safetensors"
    kept = lora.read_bytes()
    save_file({"a": torch.full((2,), 2.0)}, lora)
    with pytest.raises(gp.PlanMismatch, match="pytorch_lora_weights.safetensors' is another file"):
        load_router(folder, pipe=pipe)
    lora.unlink()
    with pytest.raises(gp.PlanMismatch, match="expert 0 lacks '.*pytorch_lora_weights.safetensors'"):
        load_router(folder, pipe=pipe)
    lora.write_bytes(kept)
    shutil.copy(lora, folder / "experts/02/weights.safetensors")
    with pytest.raises(gp.PlanMismatch, match="lies beside expert 2, and the router does not know it"):
        load_router(folder, pipe=pipe)


def test_damaged_codes_are_refused(folder, saved, pipe):
    codes = folder / "router.safetensors"
    codes.write_bytes(codes.read_bytes()[:-4])
    with pytest.raises(gp.PlanMismatch, match="router.safetensors' is another file than .*Fetch"):
        load_router(folder, pipe=pipe)
    tensors = load_file(saved / "router.safetensors")
    save_file({name: value + 1 if name == "codes" else value for name, value in tensors.items()}, codes)
    with pytest.raises(gp.PlanMismatch, match="router.safetensors' is another file"):
        load_router(folder, pipe=pipe)
    codes.unlink()
    with pytest.raises(gp.PlanMismatch, match="router.safetensors' is missing"):
        load_router(folder, pipe=pipe)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format_version": 2}, "has format 2, this genprune reads up to 1. Upgrade with"),
        ({"format_version": None}, "has no format_version"),
        ({"kind": "layer"}, "is of kind 'layer'; expected one of prompt, timestep"),
        ({"shifts": 1.0}, "unknown key 'shifts', nearest name: 'shift'"),
        ({"experts": []}, "lacks a part or has one of the wrong type|codes have shape"),
        ({"experts": [{}]}, "lacks a part or has one of the wrong type"),
        ({"experts": 3}, "lacks a part or has one of the wrong type"),
        ({"base": {"host": "UNet2DConditionModel", "sites_sha256": "0"}}, "plan of expert 0 is for"),
        ({"base": "UNet2DConditionModel"}, "lacks a part or has one of the wrong type"),
        ({"space": {}}, "architecture space lacks a part"),
        ({"familiarity": {}}, "knows of its training prompts lacks a part"),
        ({"encoder": {"kind": "else"}}, "an encoder of kind 'else'"),
        ({"shift": "much"}, "lacks a part or has one of the wrong type"),
    ],
)
def test_an_edited_configuration_is_refused(folder, pipe, changes, match):
    edited(folder, **changes)
    with pytest.raises(gp.PlanMismatch, match=match):
        load_router(folder, pipe=pipe)


def test_a_configuration_that_is_none_is_refused(folder, pipe, tmp_path):
    config = folder / "router_config.json"
    text = config.read_text()
    config.write_text(text[:100])
    with pytest.raises(gp.PlanMismatch, match="router_config.json' is not whole JSON"):
        load_router(folder, pipe=pipe)
    data = json.loads(text)
    del data["training"]
    config.write_text(json.dumps(data))
    with pytest.raises(gp.PlanMismatch, match="lacks 'training'; expected"):
        load_router(folder, pipe=pipe)
    config.unlink()
    with pytest.raises(gp.PlanMismatch, match="has no router_config.json; expected a saved router"):
        load_router(folder, pipe=pipe)
    with pytest.raises(gp.PlanMismatch, match="nowhere' is no folder; expected a saved router"):
        load_router(tmp_path / "nowhere")


def test_the_pipelines_encoder_has_to_be_given(saved, tmp_path):
    with pytest.raises(gp.PlanMismatch, match=r"reads prompts with the text_encoder of its pipeline.*pipe=pipe"):
        load_router(saved)
    pipe = tiny_pipelines.sd_pipeline(tmp_path)
    with torch.no_grad():
        for value in pipe.text_encoder.parameters():
            value.add_(0.1)
    with pytest.raises(gp.PlanMismatch, match="'pooled CLIPTextModel' has weights .*expected the same encoder"):
        load_router(saved, pipe=pipe)
    with pytest.raises(gp.UnsupportedModel, match="encoder is a Linear"):
        load_router(saved, encoder=nn.Linear(2, 2))


# ---- the base model -------------------------------------------------------------------------------------------------


def test_another_base_is_refused(router, pipe, tmp_path):
    (tmp_path / "flux").mkdir(), (tmp_path / "sd").mkdir()
    router.check_base(pipe.unet)
    with pytest.raises(gp.PlanMismatch, match="is a FluxTransformer2DModel, .* are of a UNet2DConditionModel; .*Load"):
        router.check_base(tiny_pipelines.flux_pipeline(tmp_path / "flux").transformer)
    again = tiny_pipelines.sd_pipeline(tmp_path / "sd")
    router.check_base(again.unet)
    router.check_base(again.unet.to(torch.bfloat16))
    with torch.no_grad():
        again.unet.conv_in.weight.add_(0.5)
    with pytest.raises(gp.PlanMismatch, match="weights of this UNet2DConditionModel are not those .*weights=False"):
        router.check_base(again.unet)
    router.check_base(again.unet, weights=False)
    gp.cut(again, router.plans[0])
    for weights in (True, False):
        with pytest.raises(gp.PlanMismatch, match="other sites or layers .*one that was cut before does not serve"):
            router.check_base(again.unet, weights=weights)


def test_weights_elsewhere_are_said_and_not_compared(router, pipe, caplog):
    import copy

    router.check_base(copy.deepcopy(pipe.unet).to("meta"))
    assert "are not in memory" in caplog.text
