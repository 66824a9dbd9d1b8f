"""The examples of docs/saving.md and docs/lora.md run as they stand, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.mark.parametrize("page", ["saving.md", "lora.md"])
def test_examples_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 4
    names: dict = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    printed = capsys.readouterr().out
    if page == "saving.md":
        assert "PrunedUNet2DModel ('genprune', 'PrunedUNet2DModel')" in printed
        assert "expected shape" in printed and printed.rstrip().endswith("2")
    else:
        assert "gp.adapt_lora(lora, pipe)" in printed
