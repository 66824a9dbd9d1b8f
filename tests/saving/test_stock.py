"""Stock exports: what a stock configuration can say loads where genprune cannot be imported."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from cut_models import cut_model, dense, inputs, no_pickle_in, plan_for, run, same_state
from safetensors.torch import load_file, save_file
from tiny_pipelines import sd_pipeline

import genprune as gp
from genprune.cutting import plan_base

# Loads each folder with its host alone, and writes what it computes.
_STOCK_PROGRAM = """
import json, sys

class NoGenprune:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "genprune":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoGenprune())
import torch, diffusers, timm
from safetensors.torch import load_file, save_file

for folder, cls in json.loads(sys.argv[1]):
    given = load_file(f"{folder}.inputs")
    if cls == "timm":
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    elif cls == "pipeline":
        model = diffusers.DiffusionPipeline.from_pretrained(folder).unet
    else:
        model = getattr(diffusers, cls).from_pretrained(folder)
    with torch.no_grad():
        output = model(**given)
    save_file({"output": output if isinstance(output, torch.Tensor) else output[0]}, f"{folder}.output")
"""


def without_blocks(name: str):
    """A block whose loss a stock configuration can say, and for a ViT half of every block's neurons."""
    model = dense(name)
    blocks = [n for n, site in gp.find_sites(model).items() if site.kind == "block"]
    which = 1 if name == "dit" else 0  # a DiT's first block leaves its embeddings behind
    keep = {blocks[which]: torch.zeros(1, dtype=torch.bool)}
    if name == "vit":
        torch.manual_seed(5)
        keep |= {
            n: torch.randperm(s.size) < s.size // 2 for n, s in gp.find_sites(model).items() if s.kind == "neurons"
        }
    return model, gp.cut(copy.deepcopy(model), gp.PruningPlan(plan_base(model), keep))


def test_exports_load_without_genprune(tmp_path):
    jobs, expected = [], {}
    for name, cls in (("sd", "UNet2DConditionModel"), ("flux", "FluxTransformer2DModel"),
                      ("sd3", "SD3Transformer2DModel"), ("dit", "DiTTransformer2DModel"),
                      ("pixart", "PixArtTransformer2DModel"), ("vit", "timm")):  # fmt: skip
        whole, model = without_blocks(name)
        before = copy.deepcopy(model)
        gp.export_stock(model, tmp_path / name)
        same_state(model, before)
        assert type(model) is type(before)
        given = inputs(model)
        assert (run(whole, given) - run(model, given)).abs().max() > 1e-2
        jobs.append((name, cls, given))
        expected[name] = run(model, given)
    pipe = sd_pipeline(tmp_path)
    pipe.unet = without_blocks("sd")[1]
    gp.export_stock(pipe, tmp_path / "pipe")
    assert type(pipe.unet) is gp.PrunedUNet2DConditionModel
    assert json.loads((tmp_path / "pipe" / "model_index.json").read_text())["unet"] == [
        "diffusers",
        "UNet2DConditionModel",
    ]
    jobs.append(("pipe", "pipeline", inputs(pipe.unet)))
    expected["pipe"] = run(pipe.unet, jobs[-1][2])
    for name, _, given in jobs:
        save_file({key: value.contiguous() for key, value in given.items()}, f"{tmp_path / name}.inputs")
        no_pickle_in(tmp_path / name)
        assert not list((tmp_path / name).rglob("genprune_plan*"))
    folders = json.dumps([(str(tmp_path / name), cls) for name, cls, _ in jobs])
    done = subprocess.run(
        [sys.executable, "-c", _STOCK_PROGRAM, folders], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "not initialized" not in done.stderr  # no weight was made up
    for name, value in expected.items():
        found = load_file(f"{tmp_path / name}.output")["output"]
        assert (found - value).abs().max() <= 1e-5 * value.abs().max(), name


@pytest.mark.parametrize("name", ["sd", "flux", "sd3", "dit", "pixart", "vit"])
def test_what_no_stock_configuration_says(name, tmp_path):
    with pytest.raises(gp.UnsupportedModel, match=r"sites are in the way, '.*' \(keeps \d+ of \d+\).*save"):
        gp.export_stock(cut_model(name), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_sd3s_last_block_and_gated_models_are_refused(tmp_path):
    model = without_blocks("flux")[1]
    with gp.attach_gates(model, plan_for(model)), pytest.raises(gp.PlanMismatch, match="gates are attached"):
        gp.export_stock(model, tmp_path / "m")
    gp.export_stock(dense("flux"), tmp_path / "dense")  # nothing lost: the stock model itself
    same_state(gp.load_model(tmp_path / "dense"), dense("flux"))


def test_widths_alone_are_enough(tmp_path):
    model = without_blocks("flux")[1]
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "genprune_plan.safetensors").unlink()
    gp.export_stock(gp.load_model(tmp_path / "m"), tmp_path / "stock")
    assert gp.load_model(tmp_path / "stock").config.num_layers == model.config.num_layers - 1
