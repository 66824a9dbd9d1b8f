"""The page on compensation runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compensation.md"


def test_the_page_runs():
    pytest.importorskip("timm")
    namespace: dict = {}
    for code in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S):
        exec(compile(code, PAGE.name, "exec"), namespace)
    done = namespace["done"]
    assert done.errors and not done.skipped
    assert sum(after for _, after in done.errors.values()) < 0.8 * sum(before for before, _ in done.errors.values())
