"""A whole benchmark in one process: its result, its report, the same again."""

from __future__ import annotations

import json

import pytest
import torch

from genprune.bench import (
    BadCandidate,
    BadResult,
    RunMismatch,
    Sampling,
    grader_extractor,
    image_seed,
    load_image,
    miniature_data,
    read_result,
    repeatable,
    run_benchmark,
    scene_grader,
    write_result,
)
from genprune.bench.benchmark import collect_figures
from genprune.errors import GenpruneError
from genprune.metrics import PeakMemory


@pytest.fixture(scope="module")
def settings():
    from genprune.miniature.grader import Grader

    torch.manual_seed(0)
    grader = Grader().eval()
    return {
        "data": miniature_data("dev", count=5),
        "sampling": Sampling(num_inference_steps=2, guidance_scale=2.0, batch_size=3),
        "extractors": [grader_extractor(grader)],
        "scene_scores": scene_grader(grader),
        "resamples": 100,
        "progress": False,
    }


@pytest.fixture(scope="module")
def run(folders, settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark")
    memory_of = {"dense": folders["dense"], "changed": folders["changed"]}
    return out, run_benchmark(memory_of, out, **settings, latency_rounds=3, memory=False)


def test_result_says_how_to_get_it_again(run, settings):
    out, result = run
    assert read_result(out / "result.json") == json.loads(json.dumps(result))
    assert result["sampling"] == settings["sampling"].to_json() | {"height": 32, "width": 32}
    assert result["data"] == settings["data"].provenance()
    assert result["reference"] == "dense" and result["seeds"]["images"] == 0
    assert result["extractors"][0]["weights_hash"].startswith("sha256:")
    assert [entry["sampler"] for entry in result["candidates"]] == ["DDIMScheduler"] * 2
    assert result["candidates"][0]["weights"] != result["candidates"][1]["weights"]
    assert result["versions"]["torch"] == torch.__version__.split("+")[0] or result["versions"]["torch"]
    assert result["device"]["threads"] == 1 and result["device"]["name"]


def test_figures_are_those_of_the_pictures(run):
    from genprune.metrics import psnr

    out, result = run
    dense, changed = (
        torch.stack([load_image(out / "images" / name, i) for i in range(5)]) for name in ("dense", "changed")
    )
    figures = result["figures"]
    assert figures["PSNR to dense (dB)/changed"] == pytest.approx(psnr(changed, dense).mean().item())
    assert 0 < figures["latent MSE to dense/changed"]
    assert figures["params_ratio/changed"] == figures["macs_ratio/changed"] == 1
    assert figures["macs/dense"] > figures["params/dense"] > 0
    assert "KID(miniature-grader)/floor" in figures
    assert {"denoiser_latency_ms/dense", "pipeline_latency_ratio/changed"} <= set(result["run_to_run"])
    assert "PSNR to dense (dB)/changed" not in result["run_to_run"]


def test_again_gives_the_same_but_for_times(run, folders, settings, tmp_path):
    out, result = run
    drawn = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    again = run_benchmark(dict(folders), out, **settings, latency_rounds=3, memory=False)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == drawn
    # a teammate's commit between the two runs is no difference in the result
    assert repeatable(again | {"commit": None}) == repeatable(result | {"commit": None})
    fresh = run_benchmark(dict(folders), tmp_path, **settings, latency_rounds=0, memory=False)
    same = set(repeatable(result)["figures"])
    assert {name: fresh["figures"][name] for name in same} == repeatable(result)["figures"]


def test_memory_figures_are_ratios_and_differ_from_run_to_run(run):
    peaks = {
        "dense": PeakMemory(100, 400, "rss-peak-fresh-process", "cpu"),
        "changed": PeakMemory(100, 300, "rss-peak-fresh-process", "cpu"),
    }
    found = collect_figures(run[1]["candidates"], [], {}, peaks, "dense")
    assert found["figures"]["peak_memory_bytes/dense"] == 400
    assert found["figures"]["peak_memory_ratio/changed"] == 0.75
    assert set(found["run_to_run"]) == {f"peak_memory_{q}/{n}" for q in ("bytes", "ratio") for n in peaks}


def test_report_shows_both(run):
    out, _ = run
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 10  # five prompts, two candidates
    assert "&#x27;changed&#x27; keeps 100 % of its parameters and 100 % of its arithmetic" in page
    assert "<h2>KID(miniature-grader)</h2>" in page and "(control) blank canvas" in page
    assert "http" not in page.replace("http-equiv", "")


def test_loaded_pipelines_and_prompts_alone(pipeline, tmp_path):
    result = run_benchmark(
        {"a": pipeline, "b": pipeline},
        tmp_path,
        data=["a cat", "a dog"],
        sampling=Sampling(num_inference_steps=2, batch_size=2),
        controls=False,
        latency_rounds=0,
        progress=False,
    )
    assert result["reference"] == "a" and result["memory"] == {}
    assert result["figures"]["PSNR to a (dB)/b"] == 100
    assert result["candidates"][0]["model"] is None


def test_fails_before_drawing(folders, tmp_path, settings):
    with pytest.raises(BadCandidate, match="the reference 'small' is none of the candidates dense"):
        run_benchmark({"dense": folders["dense"]}, tmp_path, reference="small")
    with pytest.raises(GenpruneError, match="unknown extractor 'incepton'.*nearest name: 'inception'"):
        run_benchmark({"dense": folders["dense"]}, tmp_path, data=["x"], extractors=["incepton"])
    with pytest.raises(GenpruneError, match="latency_rounds is 1, expected 0 for no timing, or at least 2"):
        run_benchmark({"dense": folders["dense"]}, tmp_path, data=["x"], latency_rounds=1)
    assert not list(tmp_path.rglob("*.png"))


def test_other_settings_in_the_same_folder_are_refused(run, folders, settings):
    out, _ = run
    changed = settings | {"sampling": Sampling(num_inference_steps=2, guidance_scale=2.0, batch_size=3, seed=1)}
    with pytest.raises(RunMismatch, match="differing: sampling"):
        run_benchmark(dict(folders), out, **changed)
    assert image_seed(0, 0) != image_seed(1, 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: r.pop("sampling"), "no section 'sampling'"),
        (lambda r: r.update(data=[]), "section 'data' is a list, expected"),
        (lambda r: r["figures"].update(x=float("nan")), "figure 'x' is nan, expected a finite number"),
        (lambda r: r["figures"].update(x="high"), "figure 'x' is 'high'"),
        (lambda r: r.update(run_to_run=["nothing"]), "figures that do not exist: .'nothing'"),
        (lambda r: r.update(format_version=99), "has format 99, this genprune reads up to 1. Upgrade"),
    ],
)
def test_a_damaged_result_is_neither_written_nor_read(run, tmp_path, damage, message):
    result = json.loads(json.dumps(run[1]))
    damage(result)
    with pytest.raises(BadResult, match=message):
        write_result(tmp_path / "result.json", result)
    assert not list(tmp_path.iterdir())
    (tmp_path / "edited.json").write_text(json.dumps(result))
    with pytest.raises(BadResult, match=message):
        read_result(tmp_path / "edited.json")
    (tmp_path / "cut.json").write_text(json.dumps(result)[:100])
    with pytest.raises(BadResult, match="is no JSON.*truncated"):
        read_result(tmp_path / "cut.json")
