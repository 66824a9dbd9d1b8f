"""The examples of docs/presets.md run, top to bottom, and its table is what the presets give."""

from __future__ import annotations

import json
import re
from pathlib import Path

from preset_hosts import COUNTS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "presets.md"


def test_examples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 5
    names: dict = {}
    for index, block in enumerate(blocks):
        exec(compile(block, f"presets.md block {index + 1}", "exec"), names)
    configs = {
        folder: json.loads((tmp_path / folder / "config.json").read_text())
        for folder in ("small", "small-dit", "other")
    }
    assert configs["small"]["layers_per_block"] == 1
    assert configs["small-dit"]["num_layers"] == 6
    assert configs["other"]["layers_per_block"] == [2, 2, 2, 1]
    assert "no shape of this" in capsys.readouterr().out


def test_the_table_is_true():
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|[^|]*\| ([\d,]+) \| ([\d,]+) \|", PAGE.read_text(encoding="utf-8"), re.M)
    assert {name: tuple(int(n.replace(",", "")) for n in numbers) for name, *numbers in rows} == COUNTS
