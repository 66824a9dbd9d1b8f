"""The documentation is true: links lead somewhere, the quickstart runs, every command line in it is one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

import genprune as gp
from genprune.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if page.name != "index.md" and f"({page.name})" not in index] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_parse(page):
    """Every `genprune ...` line of a page names an existing command and existing options, with values that fit."""
    group = typer.main.get_command(app)
    for line in "\n".join(blocks(page, "bash")).splitlines():
        if not line.startswith("genprune "):
            continue
        name, *arguments = shlex.split(line, comments=True)[1:]
        group.commands[name].make_context(name, arguments).close()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_public_names_in_code_exist(page):
    for name in re.findall(r"\bgp\.([A-Za-z_][A-Za-z0-9_]*)", "\n".join(blocks(page, "python"))):
        assert hasattr(gp, name), f"{page.name} uses gp.{name}"


def test_the_quickstart_runs(tmp_path, monkeypatch):
    """The python blocks of the quickstart, in order, in one namespace, in an empty folder."""
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for code in blocks(ROOT / "docs" / "quickstart.md", "python"):
        exec(compile(code, "quickstart.md", "exec"), namespace)
    assert {"plan", "small", "small-vit", "before.png", "after.png"} <= {path.name for path in tmp_path.iterdir()}
