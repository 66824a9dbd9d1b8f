"""The example of docs/ecodiff.md runs, and its tables name what is there."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import genprune as gp

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "ecodiff.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.M | re.S)
    exec(compile(code, "ecodiff.md", "exec"), {})
    assert (tmp_path / "masks" / "logits.safetensors").is_file()


def test_every_setting_is_in_the_table_with_its_default():
    table = PAGE[PAGE.index("## Settings") : PAGE.index("## Large models")]
    own = {field.name for field in dataclasses.fields(gp.EcoDiff)} - {
        field.name for field in dataclasses.fields(gp.Magnitude)
    }
    told = {
        name
        for row in table.splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    # how strongly logits decay is for comparisons with the release alone
    assert own - told == {"weight_decay"} and told <= own
    for name in ("train_steps", "batch_size", "learning_rate", "denoising_steps", "anneal", "noises_per_prompt"):
        assert f"| `{name}` | {getattr(gp.EcoDiff(), name)} |" in table


def test_the_recipes_table_has_what_runs():
    header = next(line for line in PAGE.splitlines() if line.startswith("| | sd15"))
    names = [cell.strip() for cell in header.split("|")[2:-1]]
    assert tuple(names) == gp.EcoDiff.recipes()
    rows = {"optimiser steps, here": "train_steps", "denoising steps": "denoising_steps"}
    rows |= {"first logit, here": "init", "damping, here": "damping"}
    for title, field in rows.items():
        cells = next(line for line in PAGE.splitlines() if line.startswith(f"| {title} |")).split("|")[2:-1]
        found = [float(cell.strip(" *")) for cell in cells]
        assert found == [getattr(gp.EcoDiff.recipe(name), field) for name in names], title
