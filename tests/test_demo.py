"""The demo on the embedded miniature: what it writes, what it says, and that a folder appears whole or not at all."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import genprune as gp
from genprune.bench import read_result
from genprune.demo import DemoSettings, run_demo
from genprune.errors import BudgetUnreachable, GenpruneError
from genprune.prune_run import FolderInTheWay

TINY = DemoSettings(
    prompts=4, steps=2, calibration_prompts=4, recovery_steps=2, recovery_batch=2, latency_rounds=2, memory=False
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A demo of four pictures; whether they are any good is not the question here."""
    out = tmp_path_factory.mktemp("demo") / "out"
    run_demo(out, TINY, progress=False)
    return out


def test_everything_is_there(demo):
    assert {"report.html", "result.json", "pipeline", "recovered", "plan", "baselines", "images"} <= {
        p.name for p in demo.iterdir()
    }
    assert [path.name for path in demo.parent.iterdir()] == ["out"], "a temporary folder was left"


def test_the_result_is_complete_and_names_no_place_on_this_machine(demo):
    result = read_result(demo / "result.json")
    names = ["dense", "taylor", "recovered", "magnitude", "random"]
    assert [entry["name"] for entry in result["candidates"]] == names
    models = ["miniature", "pipeline", "recovered", "miniature", "miniature"]
    assert [entry["model"] for entry in result["candidates"]] == models
    for name in names[1:]:  # 0.5 % or half a unit, whichever is more
        assert result["figures"][f"macs_ratio/{name}"] == pytest.approx(0.7, abs=0.01)
    assert result["figures"]["reload_is_exact"] == 1
    text = (demo / "result.json").read_text()
    assert str(demo.parent) not in text and str(Path(gp.__file__).parent) not in text


def test_the_page_stands_alone_and_tells_the_figures(demo):
    page = (demo / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page), "the page needs another file"
    assert page.count("<figure>") == 5 * TINY.prompts
    for words in ("A grader network", "blank canvas", "shuffled prompts", "70% of the arithmetic", "on 4 scenes"):
        assert words in page


def test_the_pruned_pipeline_draws_in_a_fresh_process(demo):
    script = (
        "import genprune; from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(demo / 'pipeline')!r})\n"
        "print(type(pipe.unet).__name__, pipe('a cat', num_inference_steps=1).images[0].size)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "PrunedUNet2DConditionModel (64, 64)" in done.stdout, done.stderr[-1000:]


def test_the_plan_is_the_cut_that_was_saved(demo):
    widths = json.loads((demo / "pipeline" / "unet" / "config.json").read_text())["pruning"]["widths"]
    assert gp.PruningPlan.load(demo / "plan").widths() == widths


def test_the_recovered_pipeline_is_the_same_cut_trained(demo):
    one_shot = gp.cut(gp.miniature.load_pipeline(), demo / "baselines" / "random").unet
    recovered = gp.load_pipeline(demo / "recovered").unet
    before, after = one_shot.state_dict(), recovered.state_dict()
    assert {name: value.shape for name, value in before.items()} == {name: v.shape for name, v in after.items()}
    assert any((before[name] - after[name]).abs().max() > 1e-6 for name in before if before[name].numel())
    result = read_result(demo / "result.json")
    assert result["figures"]["recovery_rows"] == 4 and result["demo"]["recovery"]["settings"]["steps"] == 2
    assert result["figures"]["macs_ratio/recovered"] == result["figures"]["macs_ratio/random"]


def test_a_folder_in_the_way_is_refused_before_any_work(demo):
    before = (demo / "result.json").read_bytes()
    with pytest.raises(FolderInTheWay, match="not empty; nothing was changed"):
        run_demo(demo, TINY, progress=False, say=lambda text: pytest.fail(f"worked: {text}"))
    assert (demo / "result.json").read_bytes() == before


@pytest.mark.parametrize("step", ["Planning by magnitude", "Recovering", "Drawing"])
def test_ctrl_c_leaves_nothing(step, tmp_path):
    def interrupt(text: str) -> None:
        if text.startswith(step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "out", TINY, progress=False, say=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_budget_leaves_nothing(tmp_path):
    with pytest.raises(BudgetUnreachable):
        run_demo(tmp_path / "out", DemoSettings(keep=0.001, calibration_prompts=2), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_settings_are_checked():
    with pytest.raises(GenpruneError, match="at least 4"):
        DemoSettings(prompts=2)
    with pytest.raises(GenpruneError, match="recovery_steps is 0"):
        DemoSettings(recovery_steps=0)
    assert DemoSettings.quick(prompts=12).prompts == 12 and DemoSettings.quick().steps < DemoSettings().steps
