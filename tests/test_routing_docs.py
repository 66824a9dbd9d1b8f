"""The examples of docs/routing.md run, and its table of settings is that of `gp.APTP`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import genprune as gp  # noqa: E402
from genprune.pipelines.routed_format import POLICIES, STORES  # noqa: E402
from genprune.routers import load_router  # noqa: E402
from scripts.routers import page  # noqa: E402

PAGE = page.PAGE.read_text(encoding="utf-8")


def test_the_examples_run(tmp_path, monkeypatch):
    """The python blocks, in order, in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for code in re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.M | re.S):
        exec(compile(code, "routing.md", "exec"), namespace)
    assert len(namespace["images"]) == 4 and namespace["routed"].router.kind == "prompt"
    assert (tmp_path / "work" / "curve.json").is_file()
    assert not (tmp_path / "experts" / "teacher_data").exists()  # what the page says of latents_dir
    tuned = load_router("router", pipe=namespace["dense"])
    assert all((expert.lora is not None) == (expert.usage > 0) for expert in tuned.experts)


def test_the_settings_are_those_of_the_class():
    assert page.written(PAGE) == PAGE, "run: python -m scripts.routers.page"


def test_a_field_without_a_word_is_refused(monkeypatch):
    from genprune.routers.settings import APTP

    monkeypatch.setattr(APTP, "__doc__", APTP.__doc__.replace("        groups: most", "        group: most"))
    with pytest.raises(ValueError, match="fields and docstring of APTP differ: group, groups"):
        page.settings_table()


def test_policies_and_stores_are_named():
    for name in POLICIES:
        assert f'unfamiliar="{name}"' in PAGE
    for name in STORES:
        assert f'`"{name}"`' in PAGE
    assert gp.APTP(experts=4, route_by="timestep").route_by == "timestep"
