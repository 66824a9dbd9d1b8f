"""One self-contained HTML page: pictures side by side, bars, tables, and a paragraph that a newcomer understands.

    write_report(
        "report.html",
        title="...", summary="one paragraph",
        pictures=PictureGrid(prompts, {"dense": images, "pruned": images}),
        bars=[BarChart("Size and speed", groups={"parameters": {"dense": 1.0, "pruned": 0.7}}, baseline="dense")],
        tables=[Table("Against dense", ("candidate", "PSNR"), [("pruned", "24.1 dB")])],
        details={"device": "...", "seed": 0},
    )

No script, no font and no picture from elsewhere: the file can be mailed, opened from disk, read on a phone, printed.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from genprune.bench.style import STYLE
from genprune.errors import GenpruneError
from genprune.files import whole_file
from genprune.metrics.errors import BadImages

MISSING = "–"  # what a cell without a value shows


@dataclass(frozen=True)
class PictureGrid:
    """The same prompts and seeds drawn by each candidate.

    Attributes:
        prompts: one caption a row.
        columns: candidate name -> one picture a prompt, PIL images or files, in the order they are shown.
        title: heading.
        note: a sentence below the heading.
        max_side: longer pictures are shrunk to this many px, so that the page stays small.
    """

    prompts: Sequence[str]
    columns: Mapping[str, Sequence]
    title: str = "Same prompt, same seed"
    note: str = ""
    max_side: int = 384

    def __post_init__(self) -> None:
        for name, pictures in self.columns.items():
            if len(pictures) != len(self.prompts):
                raise BadImages(
                    f"column '{name}' has {len(pictures)} pictures for {len(self.prompts)} prompts. "
                    "Pass one picture per prompt and candidate."
                )


@dataclass(frozen=True)
class BarChart:
    """Horizontal bars in groups: one group a quantity, one bar a candidate.

    Attributes:
        title: heading.
        groups: quantity -> candidate -> value >= 0; every bar of the chart shares one scale.
        baseline: the candidate drawn in grey, e.g. `dense`.
        note: a sentence below the heading, e.g. which way is better.
        decimals: digits behind the point.
        intervals: quantity -> candidate -> (low, high), printed beside the value.
    """

    title: str
    groups: Mapping[str, Mapping[str, float]]
    baseline: str = "dense"
    note: str = ""
    decimals: int = 2
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table; columns of numbers are right-aligned (strings that begin with a digit, sign or `[` count as numbers).

    Attributes:
        title: heading.
        columns: header cells.
        rows: cells, one sequence a row, as long as `columns`. Floats are printed with four significant digits.
        note: a sentence below the heading that says how to read it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise GenpruneError(
                    f"table '{self.title}' has {len(self.columns)} columns and a row of {len(row)} cells."
                )


def write_report(
    path: str | os.PathLike,
    title: str,
    summary: str,
    *,
    pictures: PictureGrid | None = None,
    bars: Sequence[BarChart] = (),
    tables: Sequence[Table] = (),
    details: Mapping[str, object] | None = None,
    footer: str = "",
) -> Path:
    """Write the page whole (temporary file, then rename) and return its path.

    Args:
        path: the `.html` file; its folder is created.
        title: of the page.
        summary: plain text, one paragraph (blank lines start new ones); say what was done and what came of it.
        pictures: shown first: it is what people came for.
        bars: charts, below the pictures.
        tables: below the charts.
        details: how it was measured, name -> value, folded away at the end (printed in full).
        footer: plain text, small.

    Raises:
        BadImages: a picture is missing or unreadable.
    """
    paragraphs = "".join(f"<p>{escape(part.strip())}</p>" for part in summary.split("\n\n") if part.strip())
    parts = [f'<header><h1>{escape(title)}</h1><div class="summary">{paragraphs}</div></header>']
    if pictures is not None:
        parts.append(_pictures(pictures))
    parts += [_bars(chart) for chart in bars]
    parts += [_table(table) for table in tables]
    if details:
        rows = "".join(
            f"<tr><th>{escape(str(name))}</th><td>{escape(_cell(value))}</td></tr>" for name, value in details.items()
        )
        heading = _heading("How this was measured", "")
        parts.append(f"<section>{heading}<div class='scroll'><table class='details'>{rows}</table></div></section>")
    if footer:
        parts.append(f"<footer>{escape(footer)}</footer>")
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n'
        f"<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n" + "\n".join(parts) + "\n</main>\n</body>\n</html>\n"
    )
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(path)


def _heading(title: str, note: str) -> str:
    return f"<h2>{escape(title)}</h2>" + (f'<p class="note">{escape(note)}</p>' if note else "")


def _pictures(grid: PictureGrid) -> str:
    cards = []
    for row, prompt in enumerate(grid.prompts):
        shown = "".join(
            f'<figure><img alt="{escape(name)}: {escape(prompt)}" src="{_data_uri(column[row], grid.max_side)}">'
            f"<figcaption>{escape(name)}</figcaption></figure>"
            for name, column in grid.columns.items()
        )
        cards.append(f'<article><h3>{escape(prompt)}</h3><div class="row">{shown}</div></article>')
    body = "\n".join(cards)
    layout = "cards wide" if len(grid.columns) > 3 else "cards"  # many pictures a prompt: one prompt a line
    return f'<section>{_heading(grid.title, grid.note)}<div class="{layout}">{body}</div></section>'


def _data_uri(picture, max_side: int) -> str:
    from PIL import Image

    try:
        image = picture if isinstance(picture, Image.Image) else Image.open(picture)
        image = image.convert("RGB")
    except OSError as error:
        raise BadImages(f"picture {picture} cannot be read ({error}). Draw it again.") from error
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    small = max(image.size) <= 128  # tiny pictures stay exact; large ones would make a page of many MB
    kind, options = ("PNG", {"optimize": True}) if small else ("JPEG", {"quality": 90})
    data = io.BytesIO()
    image.save(data, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


def _bars(chart: BarChart) -> str:
    top = max((value for group in chart.groups.values() for value in group.values()), default=0) or 1
    groups = []
    for quantity, values in chart.groups.items():
        bars = []
        for name, value in values.items():
            text = f"{value:.{chart.decimals}f}"
            interval = chart.intervals.get(quantity, {}).get(name)
            if interval:
                text += f" <small>[{interval[0]:.{chart.decimals}f}, {interval[1]:.{chart.decimals}f}]</small>"
            kind = "bar base" if name == chart.baseline else "bar"
            bars.append(
                f'<span class="name">{escape(name)}</span><span class="track">'
                f'<span class="{kind}" style="width:{100 * value / top:.2f}%"></span></span>'
                f'<span class="value">{text}</span>'
            )
        groups.append(f"<h3>{escape(quantity)}</h3>{''.join(bars)}")
    # one grid for all groups, so that all bars share one scale on the page as well
    return f'<section>{_heading(chart.title, chart.note)}<div class="bars">{"".join(groups)}</div></section>'


def _table(table: Table) -> str:
    texts = [[_cell(value) for value in row] for row in table.rows]
    kinds = [' class="number"' if all(map(_is_number, column)) else "" for column in zip(*texts, strict=True)]
    kinds = kinds or [""] * len(table.columns)  # no rows
    head = "".join(f"<th{kind}>{escape(column)}</th>" for kind, column in zip(kinds, table.columns, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(text)}</td>" for kind, text in zip(kinds, row, strict=True)) + "</tr>"
        for row in texts
    )
    return (
        f"<section class='table'>{_heading(table.title, table.note)}<div class='scroll'><table>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _is_number(text: str) -> bool:
    return text == MISSING or text[:1].isdigit() or (text[:1] in "+-[" and text[1:2].isdigit())


def _cell(value: object) -> str:
    if value is None:
        return MISSING
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    return str(value)
