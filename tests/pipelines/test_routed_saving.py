"""A routed pipeline's folder: the same pictures in a fresh process, and a clear word for whatever is wrong with it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from cut_models import no_pickle_in
from routed_cases import SIZE, routed_parts, seeded
from router_cases import WORDS
from safetensors.torch import save_file
from tiny_pipelines import sd3_pipeline, sd_pipeline

import genprune as gp
from genprune.pipelines import RoutedPipeline
from genprune.routers import TimestepRouter

_FRESH_PROGRAM = """
import json, sys
import torch
from genprune.pipelines import RoutedPipeline
folder, words, size = json.loads(sys.argv[1])
routed = RoutedPipeline.from_pretrained(folder)
routed.set_progress_bar_config(disable=True)
generators = [torch.Generator().manual_seed(seed) for seed in range(len(words))]
images = routed(words, generator=generators, output_type="np", **size).images
print("RESULT" + json.dumps([type(routed.unwrapped).__name__, routed.settings.to_json(),
                             routed.statistics().counts, images.tolist()]))
"""


def draw(routed, words=WORDS[:4]) -> np.ndarray:
    routed.set_progress_bar_config(disable=True)
    return routed(words, generator=seeded(*range(len(words))), output_type="np", **SIZE).images


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, pictures) of a routed pipeline of which one expert was fine-tuned."""
    folder = tmp_path_factory.mktemp("routed")
    pipe, router = routed_parts(sd_pipeline, folder)
    small = RoutedPipeline(pipe, router).expert_pipeline(1).unet
    weights = {name: value.detach() + 0.05 for name, value in list(small.named_parameters())[:6]}
    save_file(weights, folder / "tuned.safetensors")
    experts = list(router.experts)
    experts[1] = dataclasses.replace(experts[1], weights=folder / "tuned.safetensors")
    routed = RoutedPipeline(pipe, router.with_experts(experts), "materialised", resident=2, unfamiliar="nearest")
    pictures = draw(routed)
    routed.save_pretrained(folder / "routed")
    (folder / "tuned.safetensors").unlink()  # it is in the folder
    return folder / "routed", pictures, router


def test_a_fresh_process_draws_the_same(saved):
    folder, pictures, router = saved
    no_pickle_in(folder)
    command = [sys.executable, "-c", _FRESH_PROGRAM, json.dumps([str(folder), WORDS[:4], SIZE])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    name, settings, counts, images = json.loads(done.stdout.rpartition("RESULT")[2])
    assert name == "StableDiffusionPipeline"
    assert settings == {"store": "materialised", "resident": 2, "unfamiliar": "nearest", "capacity": False}
    assert counts == [router.route(WORDS[:4]).experts.count(expert) for expert in range(3)]
    assert np.abs(np.asarray(images) - pictures).max() < 1e-4  # float32 noise over two steps and a decoder


def test_settings_and_base_can_be_given(saved, tmp_path):
    folder, pictures, _ = saved
    routed = RoutedPipeline.from_pretrained(folder, store="reordered", torch_dtype=torch.float32)
    assert routed.settings.store == "reordered" and routed.settings.resident == 2
    assert np.abs(draw(routed) - pictures).max() < 1e-4
    routed.save_pretrained(tmp_path / "named", base=str(folder / "pipeline"))
    assert not (tmp_path / "named" / "pipeline").exists()
    assert np.abs(draw(RoutedPipeline.from_pretrained(tmp_path / "named")) - pictures).max() < 1e-4
    given = RoutedPipeline.from_pretrained(tmp_path / "named", base=routed.unwrapped)
    assert given.unwrapped.unet is routed.unwrapped.unet
    assert np.abs(draw(gp.load_pipeline(folder)) - pictures).max() < 1e-4


def test_saving_writes_the_dense_pipeline(saved):
    folder, _, _ = saved
    pipe = gp.load_pipeline(folder / "pipeline")
    assert type(pipe.unet).__name__ == "UNet2DConditionModel"
    index = json.loads((folder / "pipeline" / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]


def test_a_router_by_timestep_is_saved_as_well(saved, tmp_path):
    folder, _, router = saved
    plans = [gp.routers.Expert(plan) for plan in router.plans[:2]]
    routed = RoutedPipeline(gp.load_pipeline(folder / "pipeline"), TimestepRouter(plans, (0.4,), base=router.base))
    pictures = draw(routed)
    routed.save_pretrained(tmp_path / "steps")
    loaded = RoutedPipeline.from_pretrained(tmp_path / "steps")
    assert isinstance(loaded.router, TimestepRouter)
    assert np.abs(draw(loaded) - pictures).max() < 1e-4


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "copied")


def edited(folder, **changes):
    path = folder / "routed_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 2}, "has format 2, this genprune reads up to 1. Upgrade"),
        ({"format_version": "1"}, "has no format_version; expected 1"),
        ({"stor": "reordered"}, "unknown key 'stor', nearest name: 'store'"),
        ({"base": ""}, "names no base"),
        ({"store": "packed"}, "store='packed'.*expected one of reordered, materialised"),
        ({"resident": 0}, "resident=0; expected"),
        ({"unfamiliar": "large"}, "unfamiliar='large', nearest name: 'largest'"),
        ({"capacity": 1}, "capacity=1; expected True or False"),
    ],
)
def test_edited_configurations(copied, changes, words):
    with pytest.raises(gp.GenpruneError, match=words):
        RoutedPipeline.from_pretrained(edited(copied, **changes))


def test_missing_parts(copied, tmp_path):
    with pytest.raises(gp.PlanMismatch, match="has no routed_config.json; expected a folder that"):
        RoutedPipeline.from_pretrained(copied / "router")
    shutil.rmtree(copied / "pipeline")
    with pytest.raises(gp.PlanMismatch, match="has no folder 'pipeline'; expected the stock pipeline.*base="):
        RoutedPipeline.from_pretrained(copied)
    other, _ = routed_parts(sd3_pipeline, tmp_path)
    with pytest.raises(gp.PlanMismatch):
        RoutedPipeline.from_pretrained(copied, base=other)
    (copied / "routed_config.json").write_text("{")
    with pytest.raises(gp.PlanMismatch, match="is not whole JSON"):
        RoutedPipeline.from_pretrained(copied)


def test_another_base_is_refused(saved, copied):
    """Weights that the router was not trained on are found by its fingerprint of them."""
    from genprune.routers.fingerprints import weights_fingerprint

    pipe = gp.load_pipeline(saved[0] / "pipeline")
    config = copied / "router" / "router_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"weights_fingerprint": weights_fingerprint(pipe.unet)})
    )
    RoutedPipeline.from_pretrained(copied)
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.add_(0.1)
    with pytest.raises(gp.PlanMismatch, match="not those that the router was trained on"):
        RoutedPipeline.from_pretrained(copied, base=pipe)
    RoutedPipeline.from_pretrained(copied, base=pipe, check_weights=False)


def test_nothing_else_is_overwritten(saved, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    routed = RoutedPipeline.from_pretrained(saved[0])
    with pytest.raises(gp.PlanMismatch, match="a folder with other files; expected a new folder"):
        routed.save_pretrained(tmp_path / "notes")
    assert (tmp_path / "notes" / "diary.txt").read_text() == "mine"
    routed.save_pretrained(saved[0].parent / "twice", base="somewhere/else")
    routed.save_pretrained(saved[0].parent / "twice")
    assert (saved[0].parent / "twice" / "pipeline" / "model_index.json").is_file()
