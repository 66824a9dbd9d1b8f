"""The table of settings in docs/routing.md, from `gp.APTP` itself: `python -m scripts.routers.page` writes it anew."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "routing.md"
BEGIN, END = "<!-- settings: python -m scripts.routers.page -->\n", "<!-- end of settings -->\n"


def settings_table() -> str:
    """A row for each entry of the docstring's arguments, with the defaults of its fields.

    Raises:
        ValueError: a field has no entry, or an entry no field.
    """
    from genprune.routers.settings import APTP

    defaults = {field.name: field.default for field in dataclasses.fields(APTP)}
    arguments = APTP.__doc__.partition("Args:\n")[2].partition("\n\n")[0]
    # an entry begins at the indentation of the first line, and goes on deeper
    entries = re.split(r"\n(?= {8}\S)", arguments.rstrip())
    rows, named = ["| setting | default | |", "|---|---|---|"], []
    for entry in entries:
        names, _, text = " ".join(entry.split()).partition(": ")
        each = names.split(", ")
        named += each
        values = ", ".join(f"`{_shown(defaults.get(name))}`" for name in each)
        listed = ", ".join(f"`{name}`" for name in each)
        text = text.replace("|", "\\|").strip()
        rows.append(f"| {listed} | {values} | {text} |")
    if sorted(named) != sorted(defaults):
        other = ", ".join(sorted(set(named) ^ set(defaults)))
        raise ValueError(f"fields and docstring of APTP differ: {other}; expected an entry for each field.")
    return "\n".join(rows) + "\n"


def written(text: str) -> str:
    """The page with the table as it is now."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + settings_table() + END + rest.split(END)[1]


def _shown(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
