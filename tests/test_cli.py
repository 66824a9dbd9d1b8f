"""The command line: what is printed, exit codes, errors as one message, folders that appear whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny_pipelines import sd_pipeline
from typer.testing import CliRunner

import genprune as gp
from genprune import prune_run
from genprune.cli import app
from genprune.metrics.device import device_name
from genprune.model_source import open_source

UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}


@pytest.fixture(scope="module")
def unet_folder(tmp_path_factory) -> Path:
    """A dense U-Net's folder, as save_pretrained writes it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "unet"
    UNet2DConditionModel(**UNET).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline_folder(unet_folder, tmp_path_factory) -> Path:
    """A pipeline's folder as far as the command line reads it before any weight: its index and its U-Net."""
    folder = tmp_path_factory.mktemp("pipeline")
    shutil.copytree(unet_folder, folder / "unet")
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _no_network(*arguments, **options):
    raise LocalEntryNotFoundError("the connection is off, and nothing is in the cache")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def genprune(*arguments: object, code: int = 0):
    """Run a command; the text of standard output and of standard error."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, f"exit code {done.exit_code}\n{done.output}\n{done.exception!r}"
    return done.stdout, done.stderr


def test_help_names_every_command():
    text, _ = genprune("--help")
    for command in ("demo", "inspect", "prune", "recover", "tokens", "bench", "methods"):
        assert command in text
        assert "--help" in genprune(command, "--help")[0]


def test_version():
    assert genprune("--version")[0].strip() == f"genprune {gp.__version__}"


def test_methods_lists_each_with_its_needs():
    listed = json.loads(genprune("methods", "--json")[0])
    assert {"random", "magnitude", "taylor", "obs", "ecodiff"} <= {card["name"] for card in listed}
    assert all(card["summary"] for card in listed)
    assert "taylor" in genprune("methods")[0]


def test_inspect_agrees_with_the_library(unet_folder):
    told = json.loads(genprune("inspect", unet_folder, "--json")[0])
    model = gp.load_model(unet_folder)
    costs, sites = gp.count_costs(model), gp.find_sites(model)
    assert (told["params"], told["macs"]) == (costs.params, costs.macs)
    assert {row["kind"]: row["sites"] for row in told["kinds"]} == {
        kind: len(sites.of_kind(kind)) for kind in sites.kinds()
    }
    assert not told["pruned"]
    table, _ = genprune("inspect", unet_folder)
    assert "neurons" in table and "default kinds" in table


def test_inspect_counts_at_the_operating_point_that_is_asked_for(unet_folder):
    told = json.loads(genprune("inspect", unet_folder, "--height", 16, "--width", 16, "--json")[0])
    assert told["macs"] == gp.count_costs(gp.load_model(unet_folder), height=16, width=16).macs


def test_inspect_reads_no_weights(unet_folder, tmp_path):
    (tmp_path / "config.json").write_text((unet_folder / "config.json").read_text())
    genprune("inspect", tmp_path)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "timm/deit_tiny_patch16_224"])
def test_inspect_takes_timm_names(name):
    pytest.importorskip("timm")
    told = json.loads(genprune("inspect", name, "--json")[0])
    assert told["host"] == "VisionTransformer" and told["params"] == 5_717_416


def test_prune_writes_a_model_that_loads_and_meets_the_budget(unet_folder, tmp_path):
    out = tmp_path / "small"
    text, _ = genprune("prune", unet_folder, "--method", "magnitude", "--keep", 0.7, "--of", "macs", "--out", out)
    dense, small = gp.load_model(unet_folder), gp.load_model(out)
    assert type(small).__name__ == "PrunedUNet2DConditionModel"
    share = gp.count_costs(small).macs / gp.count_costs(dense).macs
    assert share == pytest.approx(0.7, abs=0.02)  # half a unit of a tiny model is much
    assert "load_model" in text
    assert json.loads(genprune("inspect", out, "--json")[0])["pruned"]


def test_prune_is_repeatable_and_the_plan_alone_makes_the_same_cut(unet_folder, tmp_path):
    arguments = ["prune", unet_folder, "--method", "random", "--keep", 0.8, "--seed", 3, "--no-latency", "--out"]
    told = json.loads(genprune(*arguments, tmp_path / "a", "--json")[0])
    again = json.loads(genprune(*arguments, tmp_path / "plan", "--plan-only", "--json")[0])
    assert told["widths"] == again["widths"] and told["figures"] == again["figures"]
    cut = gp.cut(gp.load_model(unet_folder), gp.PruningPlan.load(tmp_path / "plan"))
    loaded = gp.load_model(tmp_path / "a")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in cut.state_dict().items())


def test_prune_records_and_prints_latency_on_the_named_device(unet_folder, tmp_path):
    out = tmp_path / "small"
    arguments = ["prune", unet_folder, "--method", "magnitude", "--keep", 0.8]
    text, _ = genprune(*arguments, "--out", out)
    plan = gp.PruningPlan.load(out)
    assert plan.figures["latency_ms"] > 0 and plan.figures["dense_latency_ms"] > 0
    assert f"on {plan.made_by['latency_device']}" in text and plan.made_by["latency_device"] == device_name("cpu")
    assert "latency    not measured" in genprune(*arguments, "--no-latency", "--out", tmp_path / "untimed")[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("_free_bytes", lambda device: 10), "0.0 GB are free, two models of"),
        (("with_latency", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no kernel"))), "no kernel"),
        (("was_cut", lambda model: True), "was cut before"),
    ],
)
def test_prune_goes_on_and_says_why_where_latency_cannot_be_measured(
    unet_folder, tmp_path, monkeypatch, change, reason
):
    monkeypatch.setattr(prune_run, *change)
    said = []
    source, method = open_source(str(unet_folder)), gp.Magnitude(keep=0.8)
    plan = prune_run.prune_to_folder(source, method, tmp_path / "out", progress=False, say=said.append)
    assert any("Latency is not measured: " in line and reason in line for line in said), said
    assert "latency_ms" not in plan.figures and (tmp_path / "out" / "config.json").is_file()


def test_prune_takes_kinds(unet_folder, tmp_path):
    told = json.loads(
        genprune(
            *["prune", unet_folder, "--method", "magnitude", "--keep", 0.9, "--kinds", "neurons,heads"],
            *["--out", tmp_path / "out", "--json"],
        )[0]
    )
    assert {name.rsplit(":")[-1] for name in told["widths"]} <= {"neurons", "heads"}


@pytest.fixture(scope="module")
def tiny_pipeline_folder(tmp_path_factory) -> Path:
    """A whole pipeline's folder, and `prompts.txt` in it."""
    folder = tmp_path_factory.mktemp("tiny")
    sd_pipeline(folder).save_pretrained(folder)
    (folder / "prompts.txt").write_text("a cat\ntwo dogs\n")
    return folder


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("obs", ["steps=2", "samples=2"]),
        ("ecodiff", ["train_steps=1", "batch_size=1", "denoising_steps=2", "validate_every=0"]),
    ],
)
def test_prune_takes_settings_of_the_method(tiny_pipeline_folder, tmp_path, method, settings):
    given = ["prune", tiny_pipeline_folder, "--prompts", tiny_pipeline_folder / "prompts.txt", "--method", method]
    given += ["--keep", 0.9, "--of", "params", "--no-latency", "--out", tmp_path / "small", "--json"]
    given += [part for setting in settings for part in ("--set", setting)]
    given += ["--checkpoints", tmp_path / "masks"] if method == "ecodiff" else []
    told = json.loads(genprune(*given, "--pipeline-option", "height=16", "--pipeline-option", "width=16")[0])
    recorded = told["made_by"]["settings"]
    for name, value in (setting.split("=") for setting in settings):
        assert recorded[name] == int(value)
    small = gp.load_pipeline(tmp_path / "small")
    assert gp.count_costs(small).params == told["figures"]["params"]
    assert (tmp_path / "masks" / "logits.safetensors").is_file() == (method == "ecodiff")


def test_prune_compensates_before_the_cut(tiny_pipeline_folder, unet_folder, tmp_path):
    given = ["prune", tiny_pipeline_folder, "--method", "magnitude", "--keep", 0.9, "--of", "params", "--no-latency"]
    size = ["--pipeline-option", "height=16", "--pipeline-option", "width=16", "--json"]
    prompts = ["--prompts", tiny_pipeline_folder / "prompts.txt"]
    genprune(*given, *size, "--out", tmp_path / "plain")
    told = json.loads(genprune(*given, *size, *prompts, "--compensate", "bias", "--out", tmp_path / "bias")[0])
    assert told["made_by"]["compensation"]["method"] == "bias"
    plain, bias = (gp.load_pipeline(tmp_path / name).unet for name in ("plain", "bias"))
    assert gp.applied_plan(bias).keep.keys() == gp.applied_plan(plain).keep.keys()
    differ = [n for (n, a), b in zip(plain.state_dict().items(), bias.state_dict().values()) if not torch.equal(a, b)]
    assert differ and all(name.endswith("bias") for name in differ)
    _, error = genprune(*given, "--compensate", "bias", "--out", tmp_path / "none", code=2)
    assert "--compensate measures on prompts" in error and "--prompts FILE" in error
    _, error = genprune(*["prune", unet_folder, *given[2:], "--compensate", "bias", "--out", tmp_path / "x"], code=2)
    assert "--compensate measures activations on prompts" in error and "gp.compensate(model, plan, data=...)" in error


def test_prune_refuses_a_folder_in_the_way_and_force_replaces_only_results(unet_folder, tmp_path):
    out = tmp_path / "out"
    arguments = ["prune", unet_folder, "--method", "magnitude", "--keep", 0.9, "--out", out]
    genprune(*arguments)
    before = _content(out)
    _, error = genprune(*arguments, code=2)
    assert "not empty" in error and "--force" in error
    assert _content(out) == before
    genprune(*arguments[:-3], 0.8, "--out", out, "--force")
    assert _content(out) != before
    own = tmp_path / "letters"
    own.mkdir()
    (own / "letter.txt").write_text("mine")
    _, error = genprune(*arguments[:-1], own, "--force", code=2)
    assert "no earlier result" in error and (own / "letter.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "no-such-model"], "ModelNotFound"),
        (["inspect", "./no/such/folder"], "does not exist"),
        (["inspect", "someone/no-such-repository"], "hub"),
        (["prune", "MODEL", "--method", "magnitud", "--out", "OUT"], "nearest name: 'magnitude'"),
        (["prune", "MODEL", "--keep", "0", "--method", "random", "--out", "OUT"], r"expected a number in (0, 1]"),
        (["prune", "MODEL", "--keep", "2", "--method", "random", "--out", "OUT"], r"expected a number in (0, 1]"),
        (["prune", "MODEL", "--keep", "0.01", "--method", "random", "--out", "OUT"], "BudgetUnreachable"),
        (["prune", "MODEL", "--kinds", "noses", "--method", "random", "--out", "OUT"], "noses"),
        (["prune", "MODEL", "--set", "step=3", "--out", "OUT"], "Taylor has no 'step', nearest name: 'steps'"),
        (["prune", "MODEL", "--set", "steps=x", "--out", "OUT"], "no value for steps; expected a whole number"),
        (["prune", "MODEL", "--set", "keep=0.5", "--out", "OUT"], "Pass --keep 0.5 instead"),
        (["prune", "MODEL", "--pipeline-option", "height", "--out", "OUT"], "'height' is no option; expected NAME="),
        (["prune", "MODEL", "--method", "ecodiff", "--out", "OUT"], "is a model without a pipeline"),
        (["prune", "PIPELINE", "--method", "ecodiff", "--out", "OUT"], "--prompts FILE"),
        (["prune", "MODEL", "--out", "OUT"], "Pass --method magnitude, or call gp.make_plan(model, method, data=...)"),
        (["prune", "MODEL", "--prompts", "no-file.txt", "--out", "OUT"], "is a model without a pipeline"),
        (["prune", "PIPELINE", "--method", "taylor", "--out", "OUT"], "--prompts FILE"),
        (["prune", "PIPELINE", "--method", "taylor", "--prompts", "no-file.txt", "--out", "OUT"], "cannot be read"),
        (["prune", "vit_tiny_patch16_224", "--out", "OUT"], "--method magnitude"),
        (["prune", "vit_tiny_patch16_224", "--method", "magnitude", "--out", "OUT"], "ModelNotFound"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(
    arguments, words, unet_folder, pipeline_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", _no_network)
    places = {"MODEL": unet_folder, "PIPELINE": pipeline_folder, "OUT": tmp_path / "out"}
    text, error = genprune(*(places.get(argument, argument) for argument in arguments), code=2)
    assert words in " ".join(error.split()) and "Traceback" not in error
    assert text == ""
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_config_is_named(unet_folder, tmp_path):
    (tmp_path / "config.json").write_text((unet_folder / "config.json").read_text()[:50])
    _, error = genprune("inspect", tmp_path, code=2)
    assert "not whole JSON" in error and str(tmp_path) in error


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
