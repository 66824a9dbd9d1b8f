"""`accelerate launch scripts/train_router.py`: a router, experts, a routed pipeline; resumed, refused."""

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
from safetensors.torch import load_file
from tiny_pipelines import dit_pipeline, flux_pipeline, sd_pipeline

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import genprune as gp  # noqa: E402
from genprune.masks import MaskLogits  # noqa: E402
from genprune.model_source import open_source  # noqa: E402
from genprune.routers import load_router  # noqa: E402
from scripts import train_router  # noqa: E402
from scripts.routers import settings, starting  # noqa: E402

PROMPTS = ["a cat", "two dogs", "red fox", "old house", "blue bird", "green tree"]
SMALL = ["--resolution", 16, "--num_inference_steps", 1, "--guidance_scale", 2, "--cpu", "--experts", 2]
SMALL += ["--train_batch_size", 4, "--max_train_steps", 4, "--of", "params"]
TUNED = ["--finetune_steps", 3, "--finetune_batch_size", 2, "--finetune_learning_rate", 1e-3]


@pytest.fixture(autouse=True)
def no_accelerator_of_another_test():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A dense pipeline, prompts, and a folder of captioned pictures."""
    folder = tmp_path_factory.mktemp("base")
    sd_pipeline(folder).save_pretrained(folder / "dense")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "pictures").mkdir()
    rows = [{"file_name": f"{index}.png", "text": caption} for index, caption in enumerate(PROMPTS)]
    for index, row in enumerate(rows):
        Image.new("RGB", (20, 16), (40 * index, 40, 200)).save(folder / "pictures" / row["file_name"])
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def flags(base: Path, out: Path, *more: object, data: tuple = ("--prompts", "prompts.txt")) -> list[str]:
    given = ["--pretrained_model_name_or_path", base / "dense", *SMALL, *(data and (data[0], base / data[1]))]
    return [str(flag) for flag in [*given, "--output_dir", out, *more]]


def run(*arguments: object) -> int:
    return train_router.main([str(argument) for argument in arguments])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(path for path in folder.rglob("*.safetensors") if "checkpoint" not in str(path))
    return {f"{path.relative_to(folder)}/{name}": value for path in files for name, value in load_file(path).items()}


def test_one_run_gives_a_router_tuned_experts_and_a_routed_pipeline(base, tmp_path, capsys):
    out = tmp_path / "out"
    given = flags(base, out, *TUNED, "--save_pipeline")
    assert run(*given) == 0
    result = json.loads((out / "result.json").read_text())
    assert {"command", "versions", "device"} <= result.keys() and result["seeds"] == {"router": 0}
    assert result["data"]["model"] == str(base / "dense") and result["data"]["prompts"] == len(PROMPTS)
    assert result["settings"]["experts"] == 2 and result["finetuning"]["steps"] == 3
    assert len(json.loads((out / "curve.json").read_text())) == result["figures"]["steps"] == 4
    assert sum(expert["steps"] for expert in result["experts"]) == 3
    pipe = gp.load_pipeline(base / "dense")
    router = load_router(out / "router", pipe=pipe)
    assert sum(router.usage) == pytest.approx(1) and router.plans[0].operating_point["height"] == 8
    for expert, told in zip(router.experts, result["experts"], strict=True):
        assert (expert.weights is not None) == (told["steps"] > 0)
        assert expert.weights is None or out / "router" in expert.weights.parents  # a copy of its own
    assert not (out / "experts" / "teacher_data").exists()  # drawn once, for the router and its experts
    routed = gp.load_pipeline(out / "routed")
    routed.set_progress_bar_config(disable=True)
    pictures = routed(PROMPTS[:2], num_inference_steps=1, height=16, width=16, output_type="pt").images
    assert len(pictures) == 2

    before = (out / "result.json").read_bytes()
    assert run(*given) == 2
    assert "Pass --resume_from_checkpoint latest" in capsys.readouterr().err
    assert (out / "result.json").read_bytes() == before


def test_an_interrupted_run_goes_on_to_the_same_router_and_experts(base, tmp_path):
    more = [*TUNED, "--checkpointing_steps", 1, "--finetune_rank", 2]
    assert run(*flags(base, tmp_path / "whole", *more)) == 0
    out = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", out)
    for left in ("checkpoint-000004", "router", "experts"):  # as if it had ended after the third step
        shutil.rmtree(out / left)
    for left in ("curve.json", "result.json"):
        (out / left).unlink()
    again = flags(base, out, *more, "--resume_from_checkpoint", "latest")
    assert run(*again) == 0
    whole, found = (tensors(folder / "router") for folder in (tmp_path / "whole", out))
    assert whole.keys() == found.keys() and all(torch.equal(whole[name], found[name]) for name in whole)
    # within an expert: what is done stays, the last one goes on
    names = sorted(path.name for path in (out / "experts").glob("expert-*"))
    (out / "experts" / names[-1] / "finetuned.json").unlink()
    assert run(*again) == 0
    found = tensors(out / "router")
    assert all(torch.equal(whole[name], found[name]) for name in whole)


def test_captioned_pictures_and_the_noise_level(base, tmp_path):
    pytest.importorskip("datasets")
    out = tmp_path / "out"
    more = ["--route_by", "timestep", "--num_inference_steps", 4, "--keep", 0.8]
    assert run(*flags(base, out, *more, data=("--train_data_dir", "pictures"))) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["router"]["kind"] == "timestep" and len(result["router"]["boundaries"]) == 1
    assert result["data"]["pictures"] == len(PROMPTS) and result["figures"]["target"] > 0
    assert result["experts"] == [] and result["written"] == ["router"]


def test_codes_begin_around_learned_logits_or_a_plan(base, tmp_path):
    pipe = open_source(str(base / "dense")).load()
    plan = gp.make_plan(pipe, gp.Magnitude(keep=0.7, of="params"))
    plan.save(tmp_path / "plan")
    plan.save(tmp_path / "plan.safetensors")
    generator = torch.Generator().manual_seed(0)
    sites = gp.find_sites(pipe).of_kind("heads", "neurons", "channels")
    MaskLogits({name: torch.randn(site.size, generator=generator) for name, site in sites.items()}).save(
        tmp_path / "logits.safetensors"
    )
    found = {}
    for name in ("plan", "logits.safetensors"):
        assert run(*flags(base, tmp_path / f"out-{name}", "--scores", tmp_path / name, "--max_train_steps", 1)) == 0
        found[name] = load_router(tmp_path / f"out-{name}" / "router", pipe=pipe).plans[0]
    assert found["plan"] != found["logits.safetensors"]
    # begun at the plan, and one step later not far from it
    assert found["plan"].overlap(plan) > 2 * found["logits.safetensors"].overlap(plan)
    assert starting.read_scores(tmp_path / "plan.safetensors", pipe, None) == plan
    scores = starting.read_scores(tmp_path / "logits.safetensors", pipe, {"height": 8, "width": 8})
    assert scores.plan(0.7, "params").figures["params"] == pytest.approx(0.7 * scores.dense.params, rel=0.02)
    with pytest.raises(gp.PlanMismatch, match="which is no such site of this FluxTransformer2DModel"):
        starting.read_scores(tmp_path / "logits.safetensors", flux_pipeline(tmp_path), None)


def test_two_processes_train_one_router(base, tmp_path):
    # what `accelerate launch` starts on GPUs; on a CPU its own launcher needs MPI
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = flags(base, tmp_path / "two", *TUNED, "--train_batch_size", 2, "--max_train_steps", 2)
    done = subprocess.run(
        [*launch, str(ROOT / "scripts" / "train_router.py"), *two],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("result: ") == 1  # the first process alone
    assert json.loads((tmp_path / "two" / "result.json").read_text())["device"]["processes"] == 2
    assert run(*flags(base, tmp_path / "one", "--train_batch_size", 4, "--max_train_steps", 2)) == 0
    curves = [json.loads((tmp_path / name / "curve.json").read_text()) for name in ("one", "two")]
    for one, both in zip(*curves, strict=True):  # sums in another order
        assert one["gradient_norms"] == pytest.approx(both["gradient_norms"], rel=1e-3)


def parsed(*more: object):
    given = ["--pretrained_model_name_or_path", "miniature", "--output_dir", "out", *more]
    return train_router.parse([str(flag) for flag in given])


def test_flags_become_settings():
    assert settings.aptp_of(parsed()) == gp.APTP()
    given = ["--experts", 4, "--keep", 0.6, "--kinds", "heads", "neurons", "--max_train_steps", 9, "--snr_gamma", 4]
    found = settings.aptp_of(parsed(*given, "--set", "depth=false", "--set", "spread_weight=0.5"))
    expected = {"experts": 4, "keep": 0.6, "kinds": ("heads", "neurons"), "steps": 9, "min_snr_gamma": 4.0}
    assert found == gp.APTP(**expected, depth=False, spread_weight=0.5)


def test_fine_tuning_is_drawn_by_the_routers_settings():
    args = parsed("--finetune_steps", 7, "--finetune_rank", 4, "--finetune_set", "ema_decay=none", "--seed", 3)
    source = open_source("miniature")
    found = settings.finetuning_of(args, source, settings.aptp_of(args))
    assert (found.steps, found.lora_rank, found.ema_decay, found.seed, found.batch_size) == (7, 4, None, 3, 32)
    assert found.teacher_guidance is None and found.teacher_steps == gp.APTP().teacher_steps
    assert settings.finetuning_of(parsed(), source, gp.APTP()) is None


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--keep", "2"], "keep=2.0"),
        (["--keep", "0.01"], "keep=0.01"),
        (["--experts", "9"], "6 different prompts for 9 experts"),
        (["--set", "spreadweight=3"], "nearest name: 'spread_weight'"),
        (["--set", "keep=0.5"], "Pass --keep 0.5 instead"),
        (["--finetune_rank", "4"], "--finetune_rank without --finetune_steps"),
        (["--finetune_steps", "2", "--finetune_set", "stepz=3"], "no 'stepz'"),
        (["--train_data_dir", "pictures"], "are 2 sources; expected one"),
        (["--prompts", "none.txt"], "cannot be read"),
        (["--scores", "PROMPTS"], "holds neither mask logits nor a plan"),
        (["--resolution", "17"], "--resolution 17 is no size"),
        (["--pretrained_model_name_or_path", "UNET"], "is a model without a pipeline; expected a whole pipeline"),
        (["--pretrained_model_name_or_path", "./nowhere"], "does not exist"),
        (["--output_dir", "PROMPTS"], "is a file; expected a folder to write to"),
        (["--report_to", "nothing"], "--report_to nothing is not installed"),
    ],
)
def test_bad_flags_get_one_line_and_no_result(base, tmp_path, capsys, more, words):
    places = {"UNET": str(base / "dense" / "unet"), "PROMPTS": str(base / "prompts.txt")}
    given = flags(base, tmp_path / "out", *(places.get(flag, flag) for flag in more))
    assert run(*given) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert not list(tmp_path.rglob("*.json")) or not (tmp_path / "out" / "result.json").exists()


def test_a_pipeline_without_text_is_refused(base, tmp_path, capsys):
    dit_pipeline().save_pretrained(tmp_path / "dit")
    given = ["--pretrained_model_name_or_path", tmp_path / "dit", "--prompts", base / "prompts.txt", "--cpu"]
    assert run(*given, "--output_dir", tmp_path / "out") == 2
    assert "DiTPipeline" in capsys.readouterr().err


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_command_lines_of_the_docs_parse(page):
    text = "\n".join(re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.M | re.S))
    for line in text.replace("\\\n", " ").splitlines():
        if "scripts/train_router.py" in line:
            arguments = shlex.split(line.split("scripts/train_router.py")[1], comments=True)
            settings.aptp_of(train_router.parse(arguments))
