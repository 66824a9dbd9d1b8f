"""`accelerate launch scripts/distill.py`: a recovered pipeline and a result; resumed, on two processes, refused."""

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
from PIL import Image
from tiny_pipelines import sd_pipeline

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import genprune as gp  # noqa: E402
from genprune.cutting import plan_base  # noqa: E402
from genprune.model_source import open_source  # noqa: E402
from scripts import distill  # noqa: E402
from scripts.distillation import settings  # noqa: E402

REMOVED = ("mid_block.attentions.0:wrapper", "down_blocks.1.resnets.0:branch")
SMALL = ["--resolution", 16, "--num_inference_steps", 1, "--guidance_scale", 2, "--learning_rate", 1e-3, "--cpu"]
CAPTIONS = ["a cat", "two dogs", "a fox"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A dense pipeline, one cut from it, prompts, and a folder of captioned pictures."""
    folder = tmp_path_factory.mktemp("base")
    pipe = sd_pipeline(folder)
    pipe.save_pretrained(folder / "dense")
    sites = gp.find_sites(pipe)
    keep = {name: torch.zeros(sites[name].size, dtype=torch.bool) for name in REMOVED}
    gp.cut(pipe, gp.PruningPlan(plan_base(pipe.unet), keep))
    pipe.save_pretrained(folder / "small")
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS))
    (folder / "pictures").mkdir()
    rows = [{"file_name": f"{index}.png", "text": caption} for index, caption in enumerate(CAPTIONS)]
    for index, row in enumerate(rows):
        Image.new("RGB", (20, 16), (80 * index, 40, 200)).save(folder / "pictures" / row["file_name"])
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def flags(base: Path, out: Path, *more: object, data: tuple = ("--prompts", "prompts.txt")) -> list[str]:
    models = ["--pretrained_model_name_or_path", base / "small", "--teacher_model_name_or_path", base / "dense"]
    given = [*models, *SMALL, *(data and (data[0], base / data[1]))]
    return [str(flag) for flag in [*given, "--output_dir", out, *more]]


def run(*arguments: object) -> int:
    return distill.main([str(argument) for argument in arguments])


def curve(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return gp.load_pipeline(folder).unet.state_dict()


def test_a_run_on_pictures_gives_a_pipeline_and_says_how(base, tmp_path, capsys):
    pytest.importorskip("datasets")
    out, pictures = tmp_path / "out", ("--train_data_dir", "pictures")
    more = ("--max_train_steps", 3, "--train_batch_size", 2, "--use_ema", "--ema_decay", 0.9, "--snr_gamma", 5)
    looks = ("--validation_prompts", "a cat", "a dog", "--num_validation_images", 2, "--validation_steps", 2)
    assert run(*flags(base, out, *more, *looks, "--proportion_empty_prompts", 0.2, data=pictures)) == 0
    before, after = weights(base / "small"), weights(out / "pipeline")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    result = json.loads((out / "result.json").read_text())
    assert {"command", "versions", "device", "commit"} <= result.keys() and result["seeds"] == {"recovery": 0}
    assert result["data"]["name"] == "pictures" and result["data"]["pictures"] == 3
    asked = {"steps": 3, "batch_size": 2, "ema_decay": 0.9, "min_snr_gamma": 5.0, "prompt_dropout": 0.2}
    assert asked.items() <= result["settings"].items()
    assert [record["step"] for record in result["curve"]] == [1, 2, 3]
    assert result["figures"]["task/first"] == curve(out)[0]["terms"]["task"]["raw"]
    grids = sorted(path.name for path in (out / "validation").iterdir())
    assert grids == ["step-000002.png", "step-000003.png"]
    picture = Image.open(out / "validation" / grids[0])
    assert picture.size == (4 * 16, 2 * 16)  # two prompts by two images, dense above student
    top, bottom = picture.crop((0, 0, 64, 16)), picture.crop((0, 16, 64, 32))
    assert top.tobytes() != bottom.tobytes() and curve(out)[1]["validation"]["psnr_to_dense_db"] < 100
    again = Image.open(out / "validation" / grids[1])
    assert again.crop((0, 0, 64, 16)).tobytes() == top.tobytes()  # the dense pipeline's, from the same noise

    kept = (out / "result.json").read_bytes()
    assert run(*flags(base, out, *more, data=pictures)) == 2
    assert "Pass --resume_from_checkpoint latest" in capsys.readouterr().err
    assert (out / "result.json").read_bytes() == kept


def test_an_interrupted_run_goes_on_to_the_same_weights(base, tmp_path):
    out = tmp_path / "out"
    given = flags(base, out, "--max_train_steps", 2, "--train_batch_size", 1, "--checkpointing_steps", 1)
    assert run(*given) == 0
    whole, steps = weights(out / "pipeline"), curve(out)
    for left in ("checkpoint-000002", "pipeline"):  # as if it had ended after the first step
        shutil.rmtree(out / left)
    (out / "result.json").unlink()
    assert run(*given, "--resume_from_checkpoint", "latest") == 0
    again = weights(out / "pipeline")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert [record["loss"] for record in curve(out)] == [record["loss"] for record in steps]


def test_a_lora_alone(base, tmp_path):
    out = tmp_path / "out"
    assert run(*flags(base, out, "--max_train_steps", 1, "--train_batch_size", 1, "--rank", 2)) == 0
    assert not (out / "pipeline").exists()
    pipe = gp.load_pipeline(base / "small")
    pipe.load_lora_weights(out)
    assert pipe.get_list_adapters() and json.loads((out / "result.json").read_text())["written"].endswith("tensors")


def test_two_processes_train_what_one_does_with_twice_the_batch(base, tmp_path):
    # what `accelerate launch` starts on GPUs; on a CPU its own launcher needs MPI
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    steps = ("--max_train_steps", 2)
    two = flags(base, tmp_path / "two", *steps, "--train_batch_size", 1)
    done = subprocess.run(
        [*launch, str(ROOT / "scripts" / "distill.py"), *two],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("recovered: ") == 1  # the first process alone
    assert json.loads((tmp_path / "two" / "result.json").read_text())["device"]["processes"] == 2
    assert run(*flags(base, tmp_path / "one", *steps, "--train_batch_size", 2)) == 0
    for one, other in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)  # sums in another order, enlarged by Adam
    assert len(curve(tmp_path / "two")) == 2


def parsed(*more: object):
    given = ["--pretrained_model_name_or_path", "small", "--teacher_model_name_or_path", "dense"]
    return distill.parse([str(flag) for flag in [*given, "--output_dir", "out", *more]])


def test_flags_become_settings(base):
    teacher = open_source(str(base / "dense"))
    assert settings.method_of(parsed(), teacher) == gp.NormalizedDistillation()
    given = ["--lr_scheduler", "cosine", "--lr_warmup_steps", 3, "--adam_beta2", 0.95, "--rank", 4, "--use_ema"]
    given += ["--normalizer", "layernorm", "--learned_weights", "--pairing", "same", "--gradient_checkpointing"]
    given += ["--set", "feature_reduction=mean", "--set", "pairs=up_blocks.0:up_blocks.1"]
    expected = gp.NormalizedDistillation(
        lr_scheduler="cosine",
        warmup_steps=3,
        betas=(0.9, 0.95),
        lora_rank=4,
        ema_decay=settings.EMA_DECAY,
        normalizer="layernorm",
        learned_weights=True,
        pairing="same",
        gradient_checkpointing=True,
        feature_reduction="mean",
        pairs=(("up_blocks.0", "up_blocks.1"),),
    )
    assert settings.method_of(parsed(*given), teacher) == expected


def test_the_miniature_has_settings_of_its_own():
    method = settings.method_of(parsed("--max_train_steps", 10), open_source("miniature"))
    assert (method.steps, method.batch_size, method.warmup_steps, method.teacher_guidance) == (10, 32, 5, 3.5)
    assert settings.method_of(parsed("--task_weight", 1), open_source("miniature-mmdit-4-step")).prompt_dropout == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--set", "batchsize=3"], "nearest name: 'batch_size'"),
        (["--set", "seed=3"], "Pass --seed 3 instead"),
        (["--ema_decay", "0.9"], "--ema_decay 0.9 without averaged weights"),
        (["--lr_scheduler", "constant_with_warmup"], "Pass --lr_warmup_steps 500"),
        (["--train_data_dir", "x"], "--train_data_dir and --prompts are 2 sources; expected one"),
        (["--train_data_dir", "NOWHERE"], "the data set cannot be read"),
        (["--train_data_dir", "PICTURES", "--caption_column", "words"], "no column 'words'"),
        (["--max_train_samples", "0"], "--max_train_samples 0; expected at least 1"),
        (["--resolution", "17"], "--resolution 17 is no size that StableDiffusionPipeline can draw"),
        (["--prompts", ""], "Pass --prompts FILE, --dataset_name or --train_data_dir"),
        (["--report_to", "nothing"], "--report_to nothing is not installed"),
        (["--validation_prompts", "a", "--num_validation_images", "0"], "--num_validation_images 0; expected"),
        (["--teacher_model_name_or_path", "SMALL"], "is the pruned model and its teacher; expected two"),
        (["--pretrained_model_name_or_path", "UNET"], "the pruned model"),
        (["--output_dir", "FILE"], "is a file; expected a folder to write to"),
    ],
)
def test_bad_flags_get_one_line_and_nothing_is_written(base, tmp_path, capsys, more, words):
    places = {"SMALL": base / "small", "UNET": base / "small" / "unet", "FILE": base / "prompts.txt"}
    places |= {"NOWHERE": base / "nowhere", "PICTURES": base / "pictures"}
    own = more[0] == "--prompts" or "NOWHERE" in more or "PICTURES" in more
    more = [] if more == ["--prompts", ""] else [str(places.get(flag, flag)) for flag in more]
    data = () if own else ("--prompts", "prompts.txt")
    assert run(*flags(base, tmp_path / "out", *more, data=data)) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_command_lines_of_the_docs_parse(page):
    text = "\n".join(re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.M | re.S))
    for line in text.replace("\\\n", " ").splitlines():
        if "scripts/distill.py" in line:
            args = distill.parse(shlex.split(line.split("scripts/distill.py")[1], comments=True))
            settings.method_of(args, open_source("miniature"))
