"""Figures, the docs page and its plots, from a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def main_figures(parts: dict[str, Any]) -> dict[str, float]:
    """One number a claim: all-right share and PSNR of each method at half the MACs, one-shot and recovered."""
    figures = {}
    for base, part in parts.items():
        for slug, row in part["rows"].items():
            if row["keep"] != 0.5 or row["seed"]:
                continue
            name = row["method"].replace(" ", "_").replace(",", "")
            for share, point in row["points"].items():
                figures[f"{base}_{name}_all_right_at_{share}"] = point["all_right"]["estimate"]
                figures[f"{base}_{name}_psnr_at_{share}"] = point["psnr"]["estimate"]
    return figures


def write_page(docs: Path, result: dict) -> None:
    """Nothing yet."""
