"""The examples of docs/recovery.md run, and its tables name what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import genprune as gp
from genprune.recovery.distillation import NORMALIZERS

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "recovery.md").read_text(encoding="utf-8")


def test_the_examples_run(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    pipeline, classifier = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.M | re.S)
    exec(compile(pipeline, "recovery.md", "exec"), {})
    assert (tmp_path / "recovery" / "curve.jsonl").is_file()
    assert type(gp.load_pipeline("recovered").unet).__name__ == "PrunedUNet2DConditionModel"
    namespace: dict = {}
    exec(compile(classifier, "recovery.md", "exec"), namespace)
    recovered = namespace["accuracy"](namespace["vit"])
    assert namespace["one_shot"] + 0.1 < recovered  # what the section promises: the cut alone is much worse
    assert namespace["accuracy"](gp.load_model("small-vit")) == recovered


def test_every_normalizer_is_in_the_table():
    table = PAGE[PAGE.index("| `normalizer` |") : PAGE.index("The curve (")]
    assert tuple(re.findall(r"^\| `(\w+)`(?: \(default\))? \|", table, flags=re.M)[1:]) == NORMALIZERS
