"""`genprune tokens` on a small saved ViT: what is printed, presets, searches, errors as one message."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

import genprune as gp
from genprune.cli import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=4, embed_dim=32, num_heads=2, img_size=48, patch_size=8, num_classes=5
    )
    gp.save_model(model, tmp_path_factory.mktemp("vit") / "model")
    return next(tmp_path_factory.getbasetemp().glob("vit*/model"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    place = tmp_path_factory.mktemp("images")
    for index in range(3):
        pixels = torch.randint(0, 256, (40, 60, 3), generator=torch.Generator().manual_seed(index)).byte()
        Image.fromarray(pixels.numpy()).save(place / f"{index}.png")
    (place / "notes.txt").write_text("no picture")
    return place


def tokens(*arguments, code: int = 0):
    done = CliRunner().invoke(app, ["tokens", *map(str, arguments)], env={"COLUMNS": "160"})
    assert done.exit_code == code, f"exit code {done.exit_code}\n{done.output}\n{done.exception!r}"
    return done.stdout, done.stderr


def test_it_agrees_with_the_library_and_is_plain_json(folder, images, tmp_path):
    file = tmp_path / "preset.json"
    text, _ = tokens(folder, "--keep", 0.75, "--images", images, "--rounds", 2, "--save", file, "--json")
    told = json.loads(text)
    model = gp.load_model(folder).eval()
    with gp.prune_tokens(model, gp.ZeroTPrune(keep=0.75)) as handle:
        assert told["report"]["total_macs"] == handle.report().total_macs
        assert {int(layer): count for layer, count in told["method"]["keep"].items()} == handle.counts
    assert told["report"]["keep"] == pytest.approx(0.75, abs=0.01)
    assert told["latency"]["share"] > 0 and told["latency"]["batch_size"] == 1
    assert 0 <= told["agreement"] <= 1 and told["feature_distance"] > 0 and told["images"] == f"3 images of {images}"
    assert told["search"] is None and told["saved"] == str(file)
    again = json.loads(tokens(folder, "--preset", file, "--images", images, "--no-latency", "--json")[0])
    assert again["report"]["total_macs"] == told["report"]["total_macs"]
    assert again["feature_distance"] == pytest.approx(told["feature_distance"], rel=1e-4)


def test_it_reads_well(folder):
    text, steps = tokens(folder, "--counts", "1:0.5", "--score", "vote", "--set", "reduce=drop", "--no-latency")
    assert "VisionTransformer" in text and "scoring included" in text and "images of noise" in text
    assert "Loading" in steps and "Loading" not in text


def test_keeping_everything_changes_nothing(folder, images):
    told = json.loads(tokens(folder, "--keep", 1.0, "--images", images, "--no-latency", "--json")[0])
    assert told["agreement"] == 1 and told["feature_distance"] == pytest.approx(0, abs=1e-6)
    assert told["report"]["keep"] == 1


def test_a_search_is_saved(folder, images, tmp_path):
    file = tmp_path / "found.json"
    options = ("--search", "--trials", 4, "--images", images, "--no-latency", "--keep", 0.75, "--save", file)
    told = json.loads(tokens(folder, *options, "--json")[0])
    assert len(told["search"]["trials"]) == 4
    saved = json.loads(file.read_text())
    assert saved["source"] == "search" and saved["method"]["keep"] == told["method"]["keep"]


def test_a_timm_name_without_weights():
    told, _ = tokens("deit_tiny_patch16_224", "--random-weights", "--preset", "deit-.7", "--count", 1, "--no-latency")
    assert "deit_tiny_patch16_224: VisionTransformer" in told


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--keep", 0.05), "BudgetUnreachable: keep=0.05 of MACs"),
        (("--keep", 1.5), "keep=1.5; expected a share"),
        (("--layers", "2,9"), "there is no layer 9"),
        (("--layers", "two"), "--layers 'two' is no list of layers"),
        (("--counts", "2-9"), "--counts '2-9' are no counts"),
        (("--counts", "1:9", "--keep", 0.5), "--keep and --counts are both given"),
        (("--counts", "1:9", "--search"), "--search and --counts are both given"),
        (("--method", "zero_prune"), "nearest name: 'zero_tprune'"),
        (("--score", "votes"), "nearest name: 'vote'"),
        (("--set", "reduse=drop"), "nearest name: 'reduce'"),
        (("--preset", "nowhere.json"), "'nowhere.json' cannot be read"),
        (("--preset", "deit-.9", "--keep", 0.5), "--preset and --keep are given"),
        (("--preset", "deit-.9", "--method", "tome", "--of", "latency"), "--preset and --method, --of are given"),
        (("--preset", "deit-.9"), "PlanMismatch: the preset is for 12 layers"),
        (("--preset", "deit-.9", "--search"), "--search and --preset are both given"),
        (("--images", "nowhere"), "'nowhere' is no folder"),
        (("--random-weights",), "--random-weights is for a timm name"),
    ],
)
def test_errors_are_one_message(folder, options, text):
    out, told = tokens(folder, "--no-latency", *options, code=2)
    assert text in told.replace("\n", " ") and "Traceback" not in told and not out


def test_a_folder_without_pictures_is_an_error(folder, tmp_path):
    assert "holds no pictures" in tokens(folder, "--images", tmp_path, code=2)[1]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert "cannot be read as a picture" in tokens(folder, "--images", tmp_path, code=2)[1]
