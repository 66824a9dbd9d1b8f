"""The examples of docs/layers.md run, and its tables name what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import genprune as gp
from genprune.layers.menu import ENTRIES

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "layers.md").read_text(encoding="utf-8")


def test_the_examples_run():
    pytest.importorskip("timm")
    namespace: dict = {}
    for code in re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.M | re.S):
        exec(compile(code, "layers.md", "exec"), namespace)
    assert {"scores", "plan", "vit"} <= namespace.keys()
    assert namespace["scores"].additivity is not None and gp.applied_plan(namespace["vit"]) is not None


def test_every_entry_of_the_menu_is_in_the_table():
    table = PAGE[PAGE.index("| menu |") : PAGE.index("Operators are part")]
    rows = [row for row in table.splitlines()[2:] if row.startswith("|")]
    told = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert told == set(ENTRIES)
