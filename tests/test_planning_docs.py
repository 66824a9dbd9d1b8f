"""The examples of docs/costs.md and docs/planning.md run, top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

from tiny_pipelines import sd_pipeline

DOCS = Path(__file__).resolve().parent.parent / "docs"


def run_examples(page: str, names: dict) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) >= 4
    for index, block in enumerate(blocks):
        exec(compile(block, f"{page} block {index + 1}", "exec"), names)


def test_costs_page():
    run_examples("costs.md", {})


def test_planning_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_examples(
        "planning.md", {"pipe": sd_pipeline(tmp_path), "prompts": ["a cat", "two dogs"], "image_size": (16, 16)}
    )
