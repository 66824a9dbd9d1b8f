"""The HTML page: whole, self-contained, escaped."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from genprune.bench import BarChart, PictureGrid, Table, write_report
from genprune.errors import GenpruneError
from genprune.metrics import BadImages

VOID = {"meta", "img", "br"}


class Balanced(HTMLParser):
    """Fails on tags that are not closed in order; collects pictures and texts."""

    def __init__(self):
        super().__init__()
        self.open, self.pictures, self.texts = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.pictures.append(dict(attributes))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def parse(path) -> Balanced:
    page = Balanced()
    page.feed(path.read_text())
    assert not page.open
    return page


def test_the_page_holds_what_it_was_given(tmp_path):
    tiny = Image.new("RGB", (20, 20), (200, 10, 30))
    Image.new("RGB", (900, 600), (10, 20, 200)).save(tmp_path / "large.png")
    path = write_report(
        tmp_path / "new" / "report.html",
        "Title <1>",
        "First paragraph.\n\nSecond & last.",
        pictures=PictureGrid(["a <b> cat"], {"dense": [tiny], "pruned": [tmp_path / "large.png"]}, max_side=300),
        bars=[BarChart("Cost", {"MACs": {"dense": 1.0, "pruned": 0.25}}, intervals={"MACs": {"pruned": (0.2, 0.3)}})],
        tables=[Table("Scores", ("candidate", "value", "mixed"), [("dense", 1.23456, "x"), ("pruned", None, 7)])],
        details={"seed": 0, "versions": {"torch": "2"}},
    )
    page = parse(path)
    assert [picture["alt"] for picture in page.pictures] == ["dense: a <b> cat", "pruned: a <b> cat"]
    shown = []
    for picture in page.pictures:
        data = base64.b64decode(re.fullmatch(r"data:image/(?:png|jpeg);base64,(.*)", picture["src"])[1])
        shown.append(Image.open(io.BytesIO(data)))
    assert shown[0].size == (20, 20) and shown[0].getpixel((3, 3)) == (200, 10, 30)  # small ones are exact
    assert shown[1].size == (300, 200)
    for text in ("Title <1>", "First paragraph.", "Second & last.", "1.235", "–", "0.25 ", "torch 2"):
        assert text in page.texts
    source = path.read_text()
    assert "width:100.00%" in source and "width:25.00%" in source
    assert '<th class="number">value</th><th>mixed</th>' in source
    assert "prefers-color-scheme: dark" in source and "@media print" in source and "viewport" in source
    assert "<script" not in source and "http" not in source and "url(" not in source


def test_a_failed_report_leaves_the_old_one(tmp_path):
    path = write_report(tmp_path / "report.html", "old", "old")
    before = path.read_text()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(BadImages, match="broken.png cannot be read.*Draw it again"):
        write_report(path, "new", "new", pictures=PictureGrid(["x"], {"a": [tmp_path / "broken.png"]}))
    assert path.read_text() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["broken.png", "report.html"]


def test_lengths_must_fit():
    with pytest.raises(BadImages, match="column 'a' has 1 pictures for 2 prompts"):
        PictureGrid(["x", "y"], {"a": [None]})
    with pytest.raises(GenpruneError, match="table 'T' has 2 columns and a row of 1 cells"):
        Table("T", ("a", "b"), [("x",)])
