"""`accelerate launch scripts/train_masks.py`: plans, pipelines and a result; resumed, on two processes, refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_pipelines import dit_pipeline, sd_pipeline

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import genprune as gp  # noqa: E402
from genprune.masks import MaskLogits  # noqa: E402
from scripts import train_masks  # noqa: E402
from scripts.masks import prompts, settings  # noqa: E402

SMALL = ["--height", 16, "--width", 16, "--num_inference_steps", 2, "--guidance_scale", 3, "--cpu"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    sd_pipeline(folder).save_pretrained(folder / "sd")
    (folder / "prompts.txt").write_text("a cat\ntwo dogs\n")
    return folder


def flags(base: Path, out: Path, *more: object) -> list[str]:
    given = ["--pretrained_model_name_or_path", base / "sd", "--prompts_file", base / "prompts.txt", *SMALL]
    return [str(flag) for flag in [*given, "--output_dir", out, *more]]


def run(*arguments: object) -> int:
    return train_masks.main([str(argument) for argument in arguments])


def test_one_run_gives_a_plan_and_a_pipeline_for_every_budget(base, tmp_path, capsys):
    out = tmp_path / "out"
    one_step = flags(base, out, "--max_train_steps", 1, "--train_batch_size", 1, "--keep", 0.8, "--keep", 0.9)
    assert run(*one_step, "--save_pipeline") == 0
    result = json.loads((out / "result.json").read_text())
    for entry, keep in zip(result["plans"], (0.8, 0.9), strict=True):
        plan = gp.PruningPlan.load(out / entry["plan"])
        small = gp.load_pipeline(out / entry["pipeline"])
        assert gp.count_costs(small).params == plan.figures["params"] == result["figures"][f"params/{keep:g}"]
        assert entry["reached"] == pytest.approx(keep, abs=0.01) and plan.made_by["method"] == "ecodiff"
        assert plan.operating_point["height"] == 8  # latent pixels of the 16 that were asked for
    assert result["figures"]["steps"] == 1 and result["settings"]["keep"] == 0.8
    assert result["data"]["prompts"] == 2 and result["seeds"] == {"masks": 0}
    assert {"command", "versions", "device"} <= result.keys() and result["figures"]["seconds"] > 0
    assert len(json.loads((out / "curve.json").read_text())) == 1
    logits, _ = MaskLogits.load(out / "logits.safetensors")
    assert {name.rsplit(":")[-1] for name in logits} == {"heads", "neurons", "channels"}

    before = (out / "result.json").read_bytes()
    assert run(*one_step) == 2
    assert "Pass --resume_from_checkpoint latest" in capsys.readouterr().err
    assert (out / "result.json").read_bytes() == before
    # a run that is complete trains no further, and serves more budgets
    assert run(*one_step, "--keep", 0.85, "--resume_from_checkpoint", "latest") == 0
    assert gp.PruningPlan.load(out / "plan-0.85").made_by["budget"]["keep"] == 0.85
    assert len(json.loads((out / "curve.json").read_text())) == 1


def test_an_interrupted_run_goes_on_to_the_same_logits(base, tmp_path):
    out = tmp_path / "out"
    two_steps = flags(base, out, "--max_train_steps", 2, "--train_batch_size", 1, "--checkpointing_steps", 1)
    assert run(*two_steps) == 0
    whole, _ = MaskLogits.load(out / "logits.safetensors")
    for left in ("checkpoint-000002", "plan-0.8"):  # as if it had ended after the first step
        shutil.rmtree(out / left)
    for left in ("logits.safetensors", "curve.json", "result.json"):
        (out / left).unlink()
    assert run(*two_steps, "--resume_from_checkpoint", "latest") == 0
    again, _ = MaskLogits.load(out / "logits.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert len(json.loads((out / "curve.json").read_text())) == 2


def test_two_processes_learn_what_one_does_with_twice_the_batch(base, tmp_path):
    # what `accelerate launch` starts on GPUs; on a CPU its own launcher needs MPI
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = flags(base, tmp_path / "two", "--max_train_steps", 1, "--train_batch_size", 1)
    done = subprocess.run(
        [*launch, str(ROOT / "scripts" / "train_masks.py"), *two],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("plans: ") == 1  # the first process alone
    assert json.loads((tmp_path / "two" / "result.json").read_text())["device"]["processes"] == 2
    assert run(*flags(base, tmp_path / "one", "--max_train_steps", 1, "--train_batch_size", 2)) == 0
    curves = [json.loads((tmp_path / name / "curve.json").read_text())[0] for name in ("one", "two")]
    for name in ("loss", "price", "expected_share"):
        assert curves[0][name] == pytest.approx(curves[1][name], rel=1e-4), name  # sums in another order


def test_class_labels_take_the_place_of_prompts(tmp_path):
    dit_pipeline().save_pretrained(tmp_path / "dit")
    given = ["--pretrained_model_name_or_path", tmp_path / "dit", "--class_labels", 0, 1, "--keep", 0.9, "--cpu"]
    given += ["--num_inference_steps", 1, "--max_train_steps", 1, "--train_batch_size", 1]
    assert run(*given, "--output_dir", tmp_path / "out") == 0
    assert gp.PruningPlan.load(tmp_path / "out" / "plan-0.9").base.host == "DiTTransformer2DModel"


def parsed(*more: object):
    given = ["--pretrained_model_name_or_path", "miniature", "--output_dir", "out", *more]
    return train_masks.parse([str(flag) for flag in given])


def test_flags_go_on_top_of_the_recipe():
    assert settings.method_of(parsed()) == gp.EcoDiff()
    given = [
        "--recipe",
        "flux-dev",
        "--keep",
        0.7,
        "--keep",
        0.6,
        "--max_train_steps",
        5,
        "--set",
        "noises_per_prompt=2",
    ]
    method = settings.method_of(parsed(*given, "--activation_memory", "8GiB", "--guidance_scale", 2, 4))
    expected = {"train_steps": 5, "noises_per_prompt": 2, "activation_memory": "8GiB", "guidance_scale": (2.0, 4.0)}
    assert method == gp.EcoDiff.recipe("flux-dev", keep=0.7, **expected)
    assert settings.method_of(parsed("--gradient_checkpointing")).block_checkpointing


def test_a_true_guidance_leaves_the_embedded_one_as_it_is():
    given = parsed("--recipe", "flux-dev", "--true_cfg_scale", 4, "--negative_prompt", "blurry")
    assert settings.method_of(given).guidance_scale is None
    options = {"guidance_scale": 3.5, "true_cfg_scale": 4.0, "negative_prompt": "blurry"}
    assert settings.options_of(given) == options
    assert settings.options_of(parsed("--max_sequence_length", 256)) == {"max_sequence_length": 256}


def test_captions_of_a_folder_of_pictures(tmp_path):
    pytest.importorskip("datasets")
    from PIL import Image

    rows = [{"file_name": f"{index}.png", "text": f"caption {index}"} for index in range(5)]
    for row in rows:
        Image.new("RGB", (4, 4)).save(tmp_path / row["file_name"])
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = prompts.read_prompts(parsed("--train_data_dir", tmp_path, "--max_train_samples", 3), None)
    assert len(set(read)) == 3 and all(caption.startswith("caption ") for caption in read)
    with pytest.raises(gp.GenpruneError, match="no column 'words', it has .*text"):
        prompts.read_prompts(parsed("--train_data_dir", tmp_path, "--caption_column", "words"), None)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--keep", "2"], "keep=2.0 is not a share of the dense model"),
        (["--keep", "0.8", "--keep", "0.01"], "cannot be reached"),
        (["--recipe", "sdxxl"], "no EcoDiff recipe 'sdxxl', nearest name: 'sdxl'"),
        (["--set", "trainsteps=3"], "nearest name: 'train_steps'"),
        (["--class_labels", "1"], "--prompts_file and --class_labels are 2 sources; expected one"),
        (["--guidance_scale", "2", "4", "--true_cfg_scale", "3"], "--guidance_scale is a range, (2.0, 4.0)"),
        (["--height", "17"], "--height 17 is no size that StableDiffusionPipeline can draw; expected a multiple of 2"),
        (["--max_sequence_length", "8"], "StableDiffusionPipeline has no option 'max_sequence_length'"),
        (["--prompts_file", "none.txt"], "Check --prompts_file"),
        (["--prompts_file", ""], "Pass --prompts_file, --dataset_name or --train_data_dir"),
        (["--pretrained_model_name_or_path", "UNET"], "is a model without a pipeline; expected a whole pipeline"),
        (["--pretrained_model_name_or_path", "./nowhere"], "does not exist"),
        (["--output_dir", "FILE"], "is a file; expected a folder to write to"),
    ],
)
def test_bad_flags_get_one_line_and_nothing_is_written(base, tmp_path, capsys, more, words):
    places = {"UNET": str(base / "sd" / "unet"), "FILE": str(base / "prompts.txt")}
    given = flags(base, tmp_path / "out", *(places.get(flag, flag) for flag in more))
    if more == ["--prompts_file", ""]:
        given = [flag for flag in given if flag not in ("--prompts_file", "", str(base / "prompts.txt"))]
    assert run(*given) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_command_lines_of_the_docs_parse(page):
    text = "\n".join(re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.M | re.S))
    for line in text.replace("\\\n", " ").splitlines():
        if "scripts/train_masks.py" in line:
            arguments = shlex.split(line.split("scripts/train_masks.py")[1], comments=True)
            settings.method_of(train_masks.parse(arguments))
