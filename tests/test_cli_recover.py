"""`genprune recover`: a pruned pipeline's folder becomes a recovered one, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_pipelines import sd_pipeline
from typer.testing import CliRunner

import genprune as gp
from genprune import recover_run
from genprune.cli import app
from genprune.cutting import plan_base
from genprune.model_source import open_source

REMOVED = ("mid_block.attentions.0:wrapper", "down_blocks.1.resnets.0:branch")
SMALL = ["--set", "batch_size=2", "--set", "learning_rate=0.001", "--set", "teacher_steps=1"]
SIZE = ["--pipeline-option", "height=16", "--pipeline-option", "width=16"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    pipe = sd_pipeline(folder)
    pipe.save_pretrained(folder / "dense")
    sites = gp.find_sites(pipe)
    keep = {name: torch.zeros(sites[name].size, dtype=torch.bool) for name in REMOVED}
    gp.cut(pipe, gp.PruningPlan(plan_base(pipe.unet), keep))
    pipe.save_pretrained(folder / "small")
    (folder / "prompts.txt").write_text("a cat\ntwo dogs\na fox\n")
    return folder


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def genprune(*arguments: object, code: int = 0):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, f"exit code {done.exit_code}\n{done.output}\n{done.exception!r}"
    return done.stdout, done.stderr


def recover(base: Path, out: Path, *more: object, code: int = 0, steps: int = 2):
    given = ["recover", base / "small", "--teacher", base / "dense", "--out", out, "--steps", steps]
    return genprune(*given, "--prompts", base / "prompts.txt", *SMALL, *SIZE, *more, code=code)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return gp.load_pipeline(folder).unet.state_dict()


def test_help_tells_what_it_needs():
    text, _ = genprune("recover", "--help")
    for words in ("PRUNED", "--teacher", "--prompts", "--steps", "--set", "--checkpoints"):
        assert words in text


def test_the_recovered_pipeline_loads_and_says_how_it_came_about(base, tmp_path):
    out, ck = tmp_path / "out", tmp_path / "checkpoints"
    told = json.loads(recover(base, out, "--json", "--checkpoints", ck)[0])
    before, after = weights(base / "small"), weights(out)
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    pipe = gp.load_pipeline(out)
    assert type(pipe.unet).__name__ == "PrunedUNet2DConditionModel"
    assert pipe("a cat", num_inference_steps=1, output_type="np", height=16, width=16).images.shape == (1, 16, 16, 3)
    assert json.loads((out / "recovery.json").read_text()) == told
    assert told["settings"]["batch_size"] == 2 and told["figures"]["steps"] == 2
    assert told["data"] == {"name": "prompts.txt, drawn by the teacher", "prompts": 3, "pictures": 0} | {
        "sha256": told["data"]["sha256"]
    }
    assert {"task/first", "output/last", "features/last"} <= told["figures"].keys() and len(told["curve"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "out"]

    # a second run goes on there: this one has nothing left to do
    text, _ = recover(base, tmp_path / "again", "--checkpoints", ck)
    assert "to the teacher's output" in text and "from_pretrained" in text
    assert all(torch.equal(value, weights(tmp_path / "again")[name]) for name, value in after.items())


def test_a_lora_is_written_as_one(base, tmp_path):
    recover(base, tmp_path / "lora", "--set", "lora_rank=2", steps=1)
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {
        "pytorch_lora_weights.safetensors",
        "recovery.json",
    }
    pipe = gp.load_pipeline(base / "small")
    pipe.load_lora_weights(tmp_path / "lora")


def test_the_miniature_brings_its_own_data():
    teacher = open_source("miniature")
    method = recover_run.default_method(teacher, steps=2, batch_size=3)
    data = recover_run.read_data(None, teacher, method)
    assert data.pictures.shape == (6, 3, 64, 64) and 0 <= data.pictures.min() < data.pictures.max() <= 1
    assert data.prompts == gp.miniature.prompts("train", 6, 0)
    other = recover_run.read_data(None, teacher, method.changed(seed=1))
    assert other.to_json()["sha256"] != data.to_json()["sha256"]
    assert recover_run.default_method(open_source("miniature-mmdit-4-step")).task_weight == 0
    assert recover_run.default_method(teacher, task_weight=0.5).task_weight == 0.5


def test_outline_and_ends_of_a_curve():
    def record(step: int) -> dict:
        terms = {"task": {"raw": 1.0 * step}, "output": {"raw": 2.0}, "a": {"raw": 3.0}, "b": {"raw": 5.0}}
        return {"step": step, "loss": 0.0, "learning_rate": 1.0, "terms": terms}

    curve = [record(step) for step in range(1, 101)]
    ends = recover_run.ends(curve)
    assert (ends["task/first"], ends["task/last"], ends["features/last"]) == (5.5, 95.5, 4.0)
    kept = recover_run.outline(curve, points=7)
    assert len(kept) == 7 and kept[-1]["step"] == 100 and kept[-1]["features"] == 4.0
    assert recover_run.ends([]) == {} and recover_run.outline([]) == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--set", "batchsize=3"], "nearest name: 'batch_size'"),
        (["--set", "steps=3"], "Pass --steps 3 instead"),
        (["--set", "normalizer=rel_l1"], "normalizer='rel_l1'"),
        (["--teacher", "SMALL"], "is the pruned model and its teacher; expected two"),
        (["--teacher", "UNET"], "is a model without a pipeline"),
        (["--teacher", "./nowhere"], "does not exist"),
        (["--prompts", "none.txt"], "cannot be read"),
        (["--pipeline-option", "height"], "is no option; expected NAME=VALUE"),
    ],
)
def test_bad_options_get_one_message_and_nothing_is_written(base, tmp_path, more, words):
    places = {"SMALL": base / "small", "UNET": base / "dense" / "unet"}
    _, error = recover(base, tmp_path / "out", *(places.get(each, each) for each in more), code=2)
    assert words in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_models_in_each_others_place_are_told_apart(base, tmp_path):
    given = ["recover", base / "dense", "--teacher", base / "small", "--out", tmp_path / "out"]
    assert "Pass them the other way round" in genprune(*given, code=2)[1]
    given = ["recover", base / "small", "--teacher", "miniature-mmdit", "--out", tmp_path / "out"]
    assert "has a UNet2DConditionModel" in genprune(*given, code=2)[1]


def test_prompts_are_asked_for(base, tmp_path):
    given = ["recover", base / "small", "--teacher", base / "dense", "--out", tmp_path / "out"]
    assert "Pass --prompts FILE" in genprune(*given, code=2)[1]


def test_a_diverging_run_leaves_nothing(base, tmp_path):
    _, error = recover(base, tmp_path / "out", "--set", "learning_rate=1e30", code=2, steps=3)
    assert "RecoveryFailed" in error and "Lower learning_rate" in error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_refused(base, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    assert "not empty" in recover(base, tmp_path, code=2)[1]
    assert "is no earlier result" in recover(base, tmp_path, "--force", code=2)[1]
    assert (tmp_path / "mine.txt").read_text() == "kept"
