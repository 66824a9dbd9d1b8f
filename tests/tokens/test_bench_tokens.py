"""The bench of token reduction: its data, its rows and budgets, what is timed, and the page it writes."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import struct
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
timm = pytest.importorskip("timm")

import genprune as gp  # noqa: E402
from scripts import bench_tokens  # noqa: E402
from scripts.tokens import accuracy, page, quality, speed  # noqa: E402
from scripts.tokens.accuracy import counted_macs, measured, paired_against  # noqa: E402
from scripts.tokens.backbone import best_probe, features, fit_probe  # noqa: E402
from scripts.tokens.candidates import (  # noqa: E402
    CANDIDATES,
    DIFFRATE_DEIT_S,
    KEEPS,
    MAIN,
    TUNING,
    Candidate,
    Planner,
    diffrate_counts,
)
from scripts.tokens.data import GROUPS, Pictures, concept, emoji_task, fashion_task, split_by_concept  # noqa: E402
from scripts.tokens.exams import ClassifierExam, kept  # noqa: E402
from scripts.vit.data import FILES  # noqa: E402


def tiny_vit(**changes):
    torch.manual_seed(0)
    settings = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 12, "num_heads": 2, "num_classes": 5}
    model = timm.models.VisionTransformer(**{**settings, **changes})
    for parameter in model.parameters():  # positions and biases start at or near zero, which hides errors
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return tiny_vit()


@pytest.fixture(scope="module")
def exam(model):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(24, 3, 32, 32, generator=generator)
    return ClassifierExam("tiny test", model, images, torch.randint(0, 5, (24,), generator=generator))


# ---- data -------------------------------------------------------------------------------------------------------


def test_who_does_it_is_no_part_of_a_concept():
    cook = {"1f468-200d-1f373", "1f469-200d-1f373", "1f9d1-200d-1f373"}
    assert {concept(code) for code in cook} == {"1f373"}
    assert concept("1f647-200d-2640-fe0f") == concept("1f647") == "1f647"
    assert concept("1f468") == "1f468"  # a man and nothing else


def test_emoji_of_one_concept_are_in_one_split():
    named = {f"1f{n:03x}": "Objects" for n in range(300)}
    named |= {f"1f468-200d-1f{n:03x}": "People & Body" for n in range(0, 300, 3)}
    splits = split_by_concept(named)
    assert sorted(code for codes in splits.values() for code in codes) == sorted(named)
    places = {split: {concept(code) for code in codes} for split, codes in splits.items()}
    assert not places["train"] & places["test"] and not places["train"] & places["dev"]
    assert not places["dev"] & places["test"]
    assert len(places["train"]) > len(places["test"]) > len(places["dev"]) > 20


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def test_emoji_become_labelled_pictures_on_white(tmp_path):
    image = pytest.importorskip("PIL.Image")
    codes = [f"1f{n:03x}" for n in range(40)]
    with tarfile.open(tmp_path / "lobehub-fluent-emoji-3d-1.1.0.tgz", "w:gz") as archive:
        for number, code in enumerate([*codes, "1f001-1f3fb", "1f1e6"]):
            picture = image.new("RGBA", (64, 64), (0, 0, 0, 0))
            picture.paste((number % 8 * 30, 0, 0, 255), (16, 16, 48, 48))
            buffer = io.BytesIO()
            picture.save(buffer, "WEBP", lossless=True)
            add(archive, f"package/assets/{code}.webp", buffer.getvalue())
    listed = [{"unified": code.upper(), "category": GROUPS[n % 8]} for n, code in enumerate(codes)]
    listed += [{"unified": "1F001-1F3FB", "category": GROUPS[1]}, {"unified": "1F1E6", "category": "Flags"}]
    with tarfile.open(tmp_path / "emoji-datasource-16.0.0.tgz", "w:gz") as archive:
        add(archive, "package/emoji.json", json.dumps(listed).encode())
    task = emoji_task(tmp_path)
    assert sum(len(pictures) for pictures in task.splits.values()) == 40  # no skin tones, no flags
    for pictures in task.splits.values():
        assert pictures.pixels.shape[1:] == (3, 224, 224) and (pictures.pixels[:, :, 0, 0] == 255).all()
        assert torch.equal(pictures.pixels[:, 0, 112, 112].long() // 30, pictures.labels)
    assert len(emoji_task(tmp_path, most=3).splits["train"]) == 3
    with pytest.raises(FileNotFoundError, match="npm pack"):
        emoji_task(tmp_path / "nowhere")


def test_fashion_pictures_are_enlarged_bytes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 5100), ("test", 60)):
        labels = torch.randint(0, 10, (count,), generator=generator)
        images = torch.zeros(count, 28, 28, dtype=torch.uint8)
        images[torch.arange(count), labels * 2 + 4] = 250
        for name, values in ((f"{split}_images", images), (f"{split}_labels", labels)):
            header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}i", *values.shape)
            data = gzip.compress(header + values.to(torch.uint8).numpy().tobytes(), compresslevel=1)
            (tmp_path / FILES[name]).write_bytes(data)
    task = fashion_task(tmp_path, {"train": 30, "dev": 20, "test": 40})
    assert {split: len(pictures) for split, pictures in task.splits.items()} == {"train": 30, "dev": 20, "test": 40}
    pictures = task.splits["test"]
    assert pictures.pixels.max() == 250 and len(set(pictures.labels.tolist())) > 5
    batch = pictures.batch(slice(0, 8))
    assert batch.shape == (8, 3, 224, 224) and batch.dtype == torch.uint8
    brightest = batch[:, 0].float().mean(2).argmax(1)  # row of 224
    assert torch.equal(brightest // 8, pictures.labels[:8] * 2 + 4)


# ---- probes -----------------------------------------------------------------------------------------------------


def test_a_probe_separates_what_is_separable_and_has_no_randomness():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (300,), generator=generator)
    inputs = torch.randn(300, 6, generator=generator) + 4 * torch.eye(6)[labels]
    first, second = (fit_probe(inputs, labels, 3, 1e-2) for _ in range(2))
    assert (first.predict(inputs) == labels).float().mean() > 0.97
    assert torch.equal(first.weight, second.weight)
    assert fit_probe(inputs, labels, 3, 10.0).weight.norm() < 0.1 * first.weight.norm()
    probe, decay = best_probe(inputs[:200], labels[:200], inputs[200:], labels[200:], 3)
    assert decay in (1e-1, 3e-2, 1e-2, 3e-3, 1e-3) and (probe.predict(inputs[200:]) == labels[200:]).all()


def test_features_are_class_token_and_mean_of_patches():
    model = tiny_vit(img_size=224, patch_size=56, depth=2, num_classes=0)
    model.global_pool = "avg"
    pictures = Pictures(torch.randint(0, 256, (35, 1, 28, 28), dtype=torch.uint8), torch.zeros(35))
    found = features(model, pictures, bf16=False)
    assert found.shape == (35, 2, 32)
    tokens = model.forward_features(features_input(pictures))
    torch.testing.assert_close(found[:, 0], tokens[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:, 1], tokens[:, 1:].mean(1), rtol=1e-4, atol=1e-5)


def features_input(pictures: Pictures) -> torch.Tensor:
    pixels = pictures.batch(slice(0, len(pictures))).double() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)).float()


def test_tensors_are_made_once(tmp_path):
    file = tmp_path / "deep" / "values.safetensors"
    assert torch.equal(kept(file, lambda: torch.arange(3.0)), torch.arange(3.0))
    assert torch.equal(kept(file, lambda: torch.zeros(9)), torch.arange(3.0))


# ---- rows -------------------------------------------------------------------------------------------------------


def test_published_counts_are_diffrates():
    counts = diffrate_counts(196, 12)
    assert counts == {layer: count for layer, count in enumerate(DIFFRATE_DEIT_S) if layer}
    scaled = diffrate_counts(256, 12)
    assert scaled[11] == 3 and scaled[5] == round(132 * 256 / 196)
    assert list(diffrate_counts(196, 6).values()) == [193, 155, 132, 106, 63, 2]


@pytest.mark.parametrize("keep", KEEPS)
def test_rows_meet_their_share_of_the_macs(model, keep):
    planner = Planner(model)
    for candidate in CANDIDATES:
        if keep not in candidate.keeps or candidate.schedule in ("own", "published"):
            continue
        counts = planner.counts(candidate, keep)
        share = planner.costs.macs(counts, candidate.settings["placement"]) / planner.costs.dense
        assert keep - 0.03 < share <= keep, candidate.name  # 64 patches: one patch in three layers is 2 %
        steps = [before - after for before, after in zip([64, *counts.values()], counts.values())]
        if candidate.schedule == "even":
            assert list(counts) == [0, 2, 4, 6, 8, 10] and max(steps) - min(steps) <= 1
        if candidate.schedule == "thirds":
            assert list(counts) == [2, 5, 8] and steps[0] >= steps[1] >= steps[2]


def test_names_are_unique_and_keys_say_what_is_the_same(model):
    for candidates in (CANDIDATES, TUNING):
        assert len({candidate.name for candidate in candidates}) == len(candidates)
    rows = Planner(model).rows(CANDIDATES, MAIN)
    keys = [json.dumps(row.key, sort_keys=True) for row in rows]
    twice = {row.candidate.name for row, key in zip(rows, keys) if keys.count(key) > 1}
    assert twice == {
        "page rank, full",
        "+ similarity (= page rank, full)",
    }
    assert len([row for row in rows if row.candidate.schedule == "published"]) == 1
    assert not [row for row in Planner(model).rows(CANDIDATES, 0.5) if row.candidate.schedule == "published"]


def test_settings_are_spelled_out(model):
    """Beside `default` and ToMe no row may move when a default of the method does."""
    # counts are given for each layer, and the rest makes no difference or is one number
    free = {"keep", "of", "layers", "fall", "restore", "landmarks", "dense_limit", "seed"}
    needed = {field.name for field in dataclasses.fields(gp.ZeroTPrune)} - free
    for candidate in (*CANDIDATES, *TUNING):
        if candidate.kind == "ZeroTPrune" and candidate.settings:
            assert needed - set(candidate.settings) <= set(), candidate.name


def test_counted_macs_fall_with_tokens(model):
    example = torch.zeros(1, 3, 32, 32)
    dense = counted_macs(model, example)
    assert dense == Planner(model).costs.dense
    with gp.prune_tokens(model, gp.ZeroTPrune(keep=0.6)):
        assert 0.5 * dense < counted_macs(model, example) < 0.75 * dense


def test_rows_hold_differences_and_are_made_once(model, exam, tmp_path, monkeypatch):
    wanted = Planner(model).rows(tuple(c for c in CANDIDATES if c.name in ("ToMe", "one vote", "random 0")), MAIN)
    table = measured(exam, exam.example, wanted, tmp_path)
    assert [row["name"] for row in table] == ["dense", "ToMe", "one vote", "random 0"]
    assert table[0]["macs_share"] == 1 and table[0]["accuracy difference"]["estimate"] == 0
    assert table[0]["cosine"] == pytest.approx(1, abs=1e-6) and table[0]["accuracy agreement"] == 1
    for row in table[1:]:
        assert 0.5 < row["macs_share"] < 0.75 and row["cosine"] < 0.99999
        assert row["accuracy"] - table[0]["accuracy"] == pytest.approx(row["accuracy difference"]["estimate"])
        assert {int(layer) for layer in row["counts"]} <= set(range(12)) and row["counts"]
    pair = paired_against(table, "one vote", "ToMe", MAIN)
    assert pair["estimate"] == pytest.approx(table[2]["accuracy"] - table[1]["accuracy"])
    assert not gp.prune_tokens(model, gp.ToMe(r=1)).remove()  # nothing was left on the model

    monkeypatch.setattr(accuracy, "judged", lambda *arguments: pytest.fail("made again"))
    assert measured(exam, exam.example, wanted, tmp_path) == table


def test_identical_model_scores_identically(model, exam, tmp_path):
    same = Candidate("all stay", {}, "own")
    row = measured(
        exam, exam.example, [type(Planner(model).row(same, 1.0))(same, 1.0, gp.ZeroTPrune(keep=1.0))], tmp_path
    )[1]
    assert row["accuracy agreement"] == 1 and row["accuracy difference"]["high"] == 0


# ---- speed ------------------------------------------------------------------------------------------------------


def test_what_layers_are_asked_is_captured(model):
    images = torch.randn(2, 3, 32, 32)
    asked = speed.asked_of(model, speed.SCORES["full"], images)
    assert [keep for _, _, keep, _ in asked] == [57, 45, 31]  # int(64 * .9), ...
    assert [tuple(q.shape) for q, *_ in asked] == [(2, 2, 65, 16), (2, 2, 58, 16), (2, 2, 46, 16)]
    assert [view.layer for *_, view in asked] == [2, 5, 8] and not speed._asked


def test_overheads_are_shares_of_the_dense_time(model):
    found = speed.overheads(model, 32, 2, {"full": speed.SCORES["full"]}, rounds=3)
    alone = found["share"]["full"]["alone"]
    assert 0 < alone["low"] <= alone["estimate"] <= alone["high"]
    expected = found["median_ms"]["full, alone"] / found["median_ms"]["dense"]
    assert alone["estimate"] == pytest.approx(expected, rel=0.5)
    assert "inside" in found["share"]["full"] and found["rates"] == {"2": 0.9, "5": 0.8, "8": 0.7}


def test_evenly_spaced_tokens_are_kept(model):
    spaced = speed.pruned(model, speed.EvenlySpaced(keep={2: 16}, reduce="drop", placement="after_block"))
    assert spaced.forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 17, 32)
    assert speed._even(1, 4, 8).tolist() == [[0, 2, 4, 6]]
    shared = dict(spaced.named_parameters())
    assert all(shared[name] is value for name, value in model.named_parameters())
    assert model.forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 65, 32)  # hooks on the copy alone


# ---- result and page --------------------------------------------------------------------------------------------


def interval(estimate: float) -> dict:
    return {"estimate": estimate, "low": estimate - 0.01, "high": estimate + 0.01, "level": 0.95, "count": 100}


def row(name: str, group: str, keep: float | None, right: float, **more) -> dict:
    shared = {"macs_share": keep or 0.71, "accuracy": right, "accuracy difference": interval(right - 0.9)}
    return {"name": name, "group": group, "keep": keep, **shared, "accuracy agreement": 0.95, "cosine": 0.987, **more}


def parts() -> dict:
    rows = [
        row("dense", "dense", 1.0, 0.9, patches=0.8),
        row("default", "methods", 0.65, 0.88, patches=0.77),
        row("ToMe", "methods", 0.65, 0.87, patches=0.76),
        row("DiffRate's counts", "methods", None, 0.86, patches=0.7),
        row("+ RMS over heads", "ablation", 0.65, 0.8, patches=0.7),
    ]
    table = {"pictures": {"train": 300, "dev": 50, "test": 100}, "rows": rows}
    table["against_tome"] = {"default @ 0.65": interval(0.01)}
    times = {"ratio": {"default @ 0.65": interval(0.7), "ToMe @ 0.65": interval(0.75)}}
    overhead = {"share": {"full": {"alone": interval(0.03), "inside": interval(0.04)}}, "median_ms": {"dense": 500.0}}
    overhead["share"]["vote"] = {"alone": interval(0.015), "inside": interval(0.02)}
    long = {"share": {"landmark": {"alone": interval(0.01), "inside": interval(0.02)}}, "median_ms": {"dense": 900.0}}
    between = {"default over ToMe": interval(0.95)}
    ratio = {"dense": interval(1.0), "default": interval(0.7), "ToMe": interval(0.74), "ToMe, r = 0": interval(1.01)}
    equal = {"batch": 16, "between": between, "ratio": ratio, "median_ms": {"dense": 500.0}}
    found = {
        "speed": {
            "overhead": {
                "deit, batch 16": {**overhead, "batch": 16, "side": 224},
                "deit, batch 1": {**overhead, "batch": 1, "side": 224},
                "dino, batch 4": {**long, "batch": 4, "side": 518},
            },
            "equal_macs": {"deit_small_patch16_224, batch 16": equal},
        },
        "times": times,
        "accuracy": {"fashion": table, "emoji": {**table, "against_tome": {"default @ 0.65": interval(-0.03)}}},
        "tuning": {"fashion": {**table, "rows": [rows[0], row("dropped: vote", "ablation", 0.65, 0.81)]}},
        "classifier": {
            "test": {
                **table,
                "rows": [{k: v for k, v in r.items() if k != "patches"} for r in rows],
                "fine_tuning": {
                    "steps": 200,
                    "batch": 64,
                    "keep": 0.5,
                    "ToMe": {"before": 0.7, "after": 0.85, "after, all tokens": 0.86},
                },
            }
        },
    }
    return {name: {"found": part} for name, part in found.items()}


def test_figures_are_named_and_measured():
    found = page.figures(parts())
    assert found["overhead_share_vote_n197"] == 0.015 and found["overhead_share_full_n197_batch1"] == 0.03
    assert found["overhead_share_landmark_n1369"] == 0.01 and "overhead_share_landmark_n1369_batch1" not in found
    assert found["speed_ratio_vs_tome"] == found["speed_ratio_vs_tome_deit_small_batch16"] == 0.95
    assert found["accuracy_difference_vs_tome"] == pytest.approx(-0.01)  # the mean over both tasks
    assert found["accuracy_difference_vs_tome_emoji"] == -0.03
    assert found["accuracy_difference_vs_tome_classifier"] == 0.01
    assert page.figures({}) == {}


def test_the_page_holds_the_rows(tmp_path):
    file = tmp_path / "tokens-compared.md"
    file.write_text(f"before\n{page.MARK[0]}\nold\n{page.MARK[1]}\nafter\n")
    page.write_page(tmp_path, {"parts": parts()})
    text = file.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "| 65.0% | default | 88.0% | -2.0 [-3.0, -1.0] | 95.0% | 0.987 | 77.0% | +1.0 [+0.0, +2.0] | 0.70 |" in text
    assert "| 71.0% | DiffRate's counts | 86.0% |" in text  # its own counts, its own share
    assert "| deit, batch 16 | full | 500 | 0.030 [0.020, 0.040] |" in text
    assert "| ToMe | 70.0% | 85.0% | 86.0% |" in text
    assert "| dropped: vote | 81.0% / 0.9870 |" in text


def test_a_part_joins_what_is_there():
    earlier = bench_tokens.joined(None, {"speed": parts()["speed"]})
    both = bench_tokens.joined(json.loads(json.dumps(earlier)), {"accuracy": parts()["accuracy"]})
    assert list(both["parts"]) == ["speed", "accuracy"]
    assert {"speed_ratio_vs_tome", "accuracy_difference_vs_tome"} <= set(both["figures"])
    again = bench_tokens.joined(both, {"speed": {"found": {"overhead": {}, "equal_macs": {}}}})
    assert "speed_ratio_vs_tome" not in again["figures"]  # a part that was run again takes its figures along


def test_the_command_names_no_places(tmp_path):
    options = ["--parts", "accuracy", "--fashion", str(tmp_path), "--emoji", str(tmp_path), "--quick"]
    found = bench_tokens.provenance(bench_tokens.parse(options))
    assert str(tmp_path) not in json.dumps(found) and "--fashion FASHION" in found["command"]
    assert found["quick"] and found["versions"]["torch"] and found["device"]["threads"]


def test_missing_folders_are_named(capsys):
    with pytest.raises(SystemExit):
        bench_tokens.parse(["--parts", "accuracy", "--fashion", "somewhere"])
    assert "needs --emoji" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench_tokens.parse(["--page"])
    assert "pass both" in capsys.readouterr().err


def test_searched_rows_are_searched_once(model, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "TRIALS", 2)
    images = torch.randn(4, 3, 32, 32)
    rows = quality.searched("tiny", model, images, tmp_path)
    assert [row.label for row in rows] == [
        "default, searched @ 0.65",
        "page rank, full, searched @ 0.65",
        "default, searched @ 0.5",
    ]
    assert rows[1].method.reduce == "drop" and all(isinstance(row.method.keep, dict) for row in rows)
    monkeypatch.setattr(gp, "search_tokens", lambda *arguments, **settings: pytest.fail("searched again"))
    assert [row.method for row in quality.searched("tiny", model, images, tmp_path)] == [row.method for row in rows]
