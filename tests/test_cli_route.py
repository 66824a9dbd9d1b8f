"""`genprune route`: prompts and their experts, the map, pictures of a routed folder; errors as one message."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import sd_pipeline
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent / "routers"))

from router_cases import WORDS, small_router, usage_of  # noqa: E402

import genprune as gp  # noqa: E402
from genprune.cli import app  # noqa: E402
from genprune.routers import TimestepRouter  # noqa: E402
from genprune.routers.words import typical_words  # noqa: E402

SIZE = ["--pipeline-option", "height=16", "--pipeline-option", "width=16", "--steps", 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dense pipeline, routers of both kinds, a routed pipeline, prompts."""
    place = tmp_path_factory.mktemp("routed")
    pipe = sd_pipeline(place)
    pipe.save_pretrained(place / "dense")
    router = usage_of(small_router(pipe, 2), 0.25, 0.75)
    router.save_pretrained(place / "router")
    TimestepRouter(router.experts, (0.4,), base=router.base).save_pretrained(place / "steps")
    (place / "prompts.txt").write_text("\n".join(WORDS))
    gp.route_pipeline(pipe, router).save_pretrained(place / "routed")
    return place


def genprune(*arguments: object, code: int = 0):
    done = CliRunner().invoke(app, ["route", *map(str, arguments)], env={"COLUMNS": "160"})
    assert done.exit_code == code, f"exit code {done.exit_code}\n{done.output}\n{done.exception!r}"
    return done.stdout, done.stderr


def test_help_tells_what_it_needs():
    text, _ = genprune("--help")
    for words in ("ROUTER", "--prompt ", "--prompts ", "--base", "--capacity", "--map", "--draw", "--json"):
        assert words in text


@pytest.mark.parametrize("place", ["router", "routed"])
def test_routes_are_the_routers_own(folder, place):
    base = ["--base", folder / "dense"] if place == "router" else []
    given = [folder / place, "--prompts", folder / "prompts.txt", "--prompt", "a cat", *base]
    result = json.loads(genprune(*given, "--json")[0])
    router = gp.routers.load_router(folder / "router", pipe=gp.load_pipeline(folder / "dense"))
    expected = router.route(["a cat", *WORDS])
    assert tuple(route["expert"] for route in result["routes"]) == expected.experts
    assert set(expected.experts) == {0, 1}
    for row, route in enumerate(result["routes"]):
        assert route["share"] == router.shares[route["expert"]]
        assert route["similarity"] == pytest.approx(float(expected.similarities[row, route["expert"]]))
    counts = [expected.experts.count(expert) for expert in (0, 1)]
    mean = sum(count * share for count, share in zip(counts, router.shares)) / 9
    assert result["statistics"]["counts"] == counts and result["statistics"]["mean_share"] == pytest.approx(mean)
    assert result["words"] == {} and result["drawn"] == [] and result["summary"]["kind"] == "prompt"

    text, _ = genprune(*given)
    for expert, prompt in zip(expected.experts, ["a cat", *WORDS]):
        assert any(line.split()[:1] == [str(expert)] and line.endswith(f"  {prompt}") for line in text.splitlines())
    assert "9 prompts at " in text and "trained for 75.0%" in text


def test_capacity_keeps_the_budget(folder):
    cheap = ["--prompts", folder / "prompts.txt", "--json"]
    free = json.loads(genprune(folder / "routed", *cheap)[0])["statistics"]
    kept = json.loads(genprune(folder / "routed", *cheap, "--capacity")[0])["statistics"]
    assert kept["mean_share"] <= max(kept["target"], min(free["shares"])) + 1e-9
    assert kept["mean_share"] <= free["mean_share"]


def test_unfamiliar_prompts_are_told(folder):
    text, _ = genprune(folder / "routed", "--prompt", "สวัสดี", "--prompt", "a cat")
    assert text.count("unlike the training prompts: ") == 1
    _, error = genprune(folder / "routed", "--prompt", "สวัสดี", "--unfamiliar", "error", code=2)
    assert "unlike those that the router was trained on" in error and "Traceback" not in error


def test_the_map_shows_the_words_that_mark_an_expert(folder):
    text, _ = genprune(folder / "routed", "--prompts", folder / "prompts.txt", "--map", "--words", 3)
    assert "words of each expert, most typical first" in text
    result = json.loads(genprune(folder / "routed", "--prompts", folder / "prompts.txt", "--map", "--json")[0])
    assert set(result["words"]) == {"0", "1"}


def test_typical_words_are_ranked_by_their_log_odds():
    prompts = ["a red cat", "a red dog", "a Red fox", "a big red hen"] + ["a blue cat", "a blue dog", "a big blue fox"]
    found = typical_words(prompts, [0] * 4 + [1] * 3)
    assert [word.text for word in found[0]] == ["red"] and [word.text for word in found[1]] == ["blue"]
    cells = (4.5, 0.5, 0.5, 3.5)  # with and without it, here and elsewhere
    log_odds = math.log(4.5 / 0.5) - math.log(0.5 / 3.5)
    assert found[0][0].log_odds == pytest.approx(log_odds) and found[0][0].prompts == 4
    assert found[0][0].z == pytest.approx(log_odds / math.sqrt(sum(1 / cell for cell in cells)))
    assert [word.text for word in typical_words(prompts, [0] * 4 + [1] * 3, at_least=1)[0]][0] == "red"
    assert typical_words(prompts, [2] * 7) == {2: []}  # nothing to compare with
    assert typical_words(["한국 어", "한국 말", "cat"], [0, 0, 1])[0][0].text == "한국"


def test_pictures_are_those_of_the_experts_whatever_the_batch(folder, tmp_path):
    given = [folder / "routed", "--prompts", folder / "prompts.txt", *SIZE, "--seed", 5]
    text, _ = genprune(*given, "--draw", tmp_path / "one")
    assert f"8 pictures written to {tmp_path / 'one'}" in text
    genprune(*given, "--draw", tmp_path / "three", "--batch-size", 3)
    genprune(*given[1:], folder / "router", "--base", folder / "dense", "--draw", tmp_path / "base")
    routed = gp.load_pipeline(folder / "routed")
    routed.set_progress_bar_config(disable=True)
    experts = routed.router.route(WORDS).experts
    for expert in (0, 1):
        row = experts.index(expert)
        generator = torch.Generator().manual_seed(5 + row)
        call = {"num_inference_steps": 1, "height": 16, "width": 16, "generator": generator}
        picture = routed.expert_pipeline(expert)(WORDS[row], **call).images[0]
        for name in ("one", "three", "base"):
            assert len(list((tmp_path / name).iterdir())) == 8
            found = np.asarray(Image.open(tmp_path / name / f"{row:04}.png")).astype(int)
            assert abs(found - np.asarray(picture).astype(int)).max() <= 1  # another batch size rounds otherwise
    _, error = genprune(*given, "--draw", tmp_path / "one", code=2)
    assert "exists; expected a new folder for pictures" in error


def test_a_router_by_timestep_shows_its_intervals(folder, tmp_path):
    text, _ = genprune(folder / "steps")
    assert "noise levels of the experts: 0: 0-0.4, 1: 0.4-1" in text
    result = json.loads(genprune(folder / "steps", "--prompt", "a cat", "--json")[0])
    assert result["routes"] == [] and result["statistics"] is None and result["summary"]["boundaries"] == [0.4]
    drawing = [folder / "steps", "--base", folder / "dense", "--draw", tmp_path / "out", *SIZE]
    genprune(*drawing, "--prompt", "a cat")
    assert (tmp_path / "out" / "0000.png").is_file()
    _, error = genprune(folder / "steps", "--prompt", "a cat", "--map", code=2)
    assert "is a router by timestep" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--prompt", "a cat"], "is no folder; expected a router's folder"),
        (["dense", "--prompt", "a cat"], "has neither routed_config.json nor router_config.json"),
        (["router", "--prompt", "a cat"], "Pass --base MODEL"),
        (["routed"], "no prompts are given; expected some to route"),
        (["routed", "--prompt", " "], "blank"),
        (["routed", "--prompts", "nothing.txt"], "cannot be read"),
        (["routed", "--prompt", "a cat", "--unfamiliar", "largst"], "nearest name: 'largest'"),
        (["routed", "--prompt", "a cat", "--encoder", "nowhere"], "nowhere"),
        (["steps", "--draw", "new", "--prompt", "a cat"], "Pass --base with the dense pipeline"),
        (["router", "--base", "nothing", "--prompt", "a cat"], "nothing"),
    ],
)
def test_errors_are_one_message(folder, monkeypatch, arguments, words):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    _, error = genprune(*arguments, code=2)
    assert words in " ".join(error.split()) and "Traceback" not in error
    assert not (folder / "new").exists()
