"""A cut pipeline saves, and loads again in a fresh process, by diffusers' own functions."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from cut_models import cut_model, difference, no_pickle_in, plan_for, run
from diffusers import (
    AutoPipelineForImage2Image,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from tiny_pipelines import dit_pipeline, flux_pipeline, pixart_alpha_pipeline, sd3_pipeline, sd_pipeline

import genprune as gp

_FRESH_PROGRAM = """
import json, sys
import torch
from diffusers import DiffusionPipeline
try:
    DiffusionPipeline.from_pretrained(sys.argv[2])
except ValueError as error:
    print("REFUSED", error)
import genprune
import numpy as np
result = {}
for folder, kwargs in json.loads(sys.argv[1]):
    if "torch_dtype" in kwargs:
        kwargs["torch_dtype"] = getattr(torch, kwargs["torch_dtype"])
    pipe = DiffusionPipeline.from_pretrained(folder, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a cat", num_inference_steps=2, height=16, width=16, output_type="np",
                 generator=torch.Generator().manual_seed(0)).images
    result[len(result)] = [type(pipe).__name__, type(pipe.unet).__name__, str(pipe.unet.dtype), image.tolist()]
print("RESULT" + json.dumps(result))
"""


def draw(pipe) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    seeded = torch.Generator().manual_seed(0)
    return pipe("a cat", num_inference_steps=2, height=16, width=16, output_type="np", generator=seeded).images


@pytest.fixture
def pipe(tmp_path):
    return sd_pipeline(tmp_path)


def index_of(folder) -> dict:
    return json.loads((folder / "model_index.json").read_text())


def test_fresh_process(pipe, tmp_path):
    before = draw(pipe)
    gp.cut(pipe, plan_for(pipe.unet))
    expected = draw(pipe)
    assert np.abs(before - expected).max() > 1e-2
    pipe.save_pretrained(tmp_path / "whole")
    pipe.save_pretrained(tmp_path / "shards", max_shard_size="20KB", variant="fp16")
    assert len(list((tmp_path / "shards" / "unet").glob("*.fp16-*.safetensors"))) > 2
    index = index_of(tmp_path / "whole")
    assert index["unet"] == ["genprune", "PrunedUNet2DConditionModel"]
    assert index["_class_name"] == "StableDiffusionPipeline"
    no_pickle_in(tmp_path / "whole")
    whole, shards = str(tmp_path / "whole"), str(tmp_path / "shards")
    jobs = [
        (whole, {}),
        (whole, {"low_cpu_mem_usage": False}),
        (whole, {"device_map": "cpu"}),
        (shards, {"variant": "fp16"}),
        (whole, {"torch_dtype": "bfloat16"}),
    ]
    command = [sys.executable, "-c", _FRESH_PROGRAM, json.dumps(jobs), whole]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "import genprune before calling `from_pretrained`" in done.stdout.partition("RESULT")[0]
    results = json.loads(done.stdout.rpartition("RESULT")[2]).values()
    for (_, kwargs), (kind, unet, dtype, image) in zip(jobs, results, strict=True):
        assert (kind, unet) == ("StableDiffusionPipeline", "PrunedUNet2DConditionModel")
        assert dtype == f"torch.{kwargs.get('torch_dtype', 'float32')}"
        if "torch_dtype" not in kwargs:
            assert np.abs(np.asarray(image) - expected).max() < 1e-4  # float32 noise over two steps and a decoder


@pytest.mark.parametrize("make", [sd_pipeline, flux_pipeline, sd3_pipeline, dit_pipeline, pixart_alpha_pipeline])
def test_cutting_the_component_and_saving_the_pipeline(make, tmp_path):
    """The pipeline's index would go on naming the stock class, which cannot load what is saved."""
    pipe = make(tmp_path)
    slot = "unet" if hasattr(pipe, "unet") else "transformer"
    model = getattr(pipe, slot)
    gp.cut(model, plan_for(model))
    pipe.save_pretrained(tmp_path / "p")
    assert index_of(tmp_path / "p")[slot] == ["genprune", type(model).__name__]
    loaded = getattr(DiffusionPipeline.from_pretrained(tmp_path / "p"), slot)
    assert type(loaded) is type(model)
    assert difference(run(loaded), run(model)) < 1e-5
    assert getattr(pipe.config, slot) == ("genprune", type(model).__name__)


def test_a_pruned_component_in_a_stock_pipeline_and_a_compiled_one(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "base")
    model = cut_model("sd")
    model.save_pretrained(tmp_path / "unet")
    unet = gp.PrunedUNet2DConditionModel.from_pretrained(tmp_path / "unet")
    mixed = StableDiffusionPipeline.from_pretrained(tmp_path / "base", unet=unet)
    mixed.save_pretrained(tmp_path / "mixed")
    assert index_of(tmp_path / "mixed")["unet"][0] == "genprune"
    gp.cut(pipe.unet, plan_for(pipe.unet))
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    pipe.save_pretrained(tmp_path / "compiled")
    assert index_of(tmp_path / "compiled")["unet"] == ["genprune", "PrunedUNet2DConditionModel"]


def test_other_tasks_with_the_same_components(pipe):
    gp.cut(pipe, plan_for(pipe.unet))
    assert AutoPipelineForImage2Image.from_pipe(pipe).unet is pipe.unet
    assert StableDiffusionImg2ImgPipeline.from_pipe(pipe, unet=pipe.unet).unet is pipe.unet
    assert StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False).unet is pipe.unet
    with pytest.raises(ValueError, match="expected.*unet"):  # the host's own: it compares classes exactly
        StableDiffusionImg2ImgPipeline.from_pipe(pipe)


def test_gated_pipelines_are_not_saved(pipe, tmp_path):
    gp.cut(pipe, plan_for(pipe.unet, depth=False))
    gates = gp.attach_gates(pipe, plan_for(pipe.unet, seed=3, depth=False))
    with gates, pytest.raises(gp.PlanMismatch, match="gates are attached"):
        pipe.save_pretrained(tmp_path / "p")
