"""The Python examples of docs/metrics.md and docs/benchmark.md run, top to bottom."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def run(page: str) -> dict:
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names


def test_metrics_page(capsys):
    names = run("metrics.md")
    assert names["difference"].count == 32
    printed = capsys.readouterr().out
    assert "FD(random-conv) = " in printed and "KID(random-conv) = " in printed and "PSNR = " in printed


def test_benchmark_page(folders, tmp_path, monkeypatch):
    shutil.copytree(folders["dense"], tmp_path / "dense")
    shutil.copytree(folders["changed"], tmp_path / "pruned")
    monkeypatch.chdir(tmp_path)
    run("benchmark.md")
    assert (tmp_path / "page.html").is_file() and (tmp_path / "out" / "report.html").is_file()
