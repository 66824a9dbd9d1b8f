"""Figures, tables and curves of the comparison; generated from the JSON, never edited."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from genprune.files import whole_file

MARK = "<!-- begin: generated from docs/results/layers.json -->", "<!-- end: generated -->"
TITLES = {"unet": "Miniature A (U-Net, 20 DDIM steps)", "mmdit": "Miniature B (FLUX-shaped, 20 Euler steps)"}
SHARES = ("0", "0.001", "0.01", "0.05")
HEADS = ("one-shot", "0.1 %", "1 %", "5 %")


def main_figures(parts: dict[str, Any]) -> dict[str, float]:
    """Share of captions all right, and PSNR to the dense pictures, of each method at half the MACs."""
    figures = {}
    for base, part in parts.items():
        for row in part["rows"].values():
            if row["keep"] != 0.5 or row["seed"]:
                continue
            name = re.sub(r"[^a-z0-9]+", "_", f"{base} {row['method']}".lower())
            for share, point in row["points"].items():
                figures[f"all_right_{name}_at_{share}"] = point["all_right"]["estimate"]
                figures[f"psnr_{name}_at_{share}"] = point["psnr"]["estimate"]
    return figures


def write_page(docs: Path, result: dict, grids: Path) -> None:
    """Put the tables between the marks of `layers-compared.md`, and write plots and picture grids beside it.

    Args:
        docs: folder of the page.
        result: what `bench_layers.py` writes.
        grids: folder of `BASE/grid.png`, copied where they are.
    """
    lines = []
    for base, part in result["bases"].items():
        lines += [f"### {TITLES.get(base, base)}", "", *_table(part), "", *_notes(part), ""]
        picture = docs / "layers" / f"{base}.svg"
        _plots(part, picture)
        lines += [f"![Recovery at half the MACs, and quality over time, {base}]({picture.relative_to(docs)})", ""]
        if (grids / base / "grid.png").is_file():
            shutil.copy(grids / base / "grid.png", docs / "layers" / f"{base}.png")
            lines += [f"![First test captions at half the MACs, {base}](layers/{base}.png)", ""]
            lines += [
                "*The first test captions, unselected, at half the MACs before any recovery; rows as named.*",
                "",
            ]
    if "vit" in result:
        lines += ["### A ViT classifier on Fashion-MNIST", "", *_vit(result["vit"]), ""]
    page = docs / "layers-compared.md"
    text = page.read_text()
    begin, end = text.index(MARK[0]) + len(MARK[0]), text.index(MARK[1])
    with whole_file(page) as temporary:
        temporary.write_text(text[:begin] + "\n\n" + "\n".join(lines).rstrip() + "\n\n" + text[end:])


def _table(part: dict) -> list[str]:
    dense = part["dense"]
    latency = {name: found["ratio"] for name, found in part.get("latency", {}).items()}
    lines = [
        f"Dense: {dense['all_right']['estimate']:.1%} of the captions all right. Cells: PSNR to the dense pictures in "
        "dB / captions all right, one-shot and after recovery on that share of the samples that the base has seen.",
        "",
        "| kept | method | params | " + " | ".join(HEADS) + " |" + "".join(f" time, {name} |" for name in latency),
        "|---|---|---:|" + "---:|" * (len(HEADS) + len(latency)),
    ]
    for slug, row in sorted(part["rows"].items(), key=lambda item: -item[1]["keep"]):
        cells = []
        for share in SHARES:
            point = row["points"].get(share)
            found = f"{point['psnr']['estimate']:.1f} / {point['all_right']['estimate']:.0%}" if point else ""
            cells.append(found)
        costs = row["costs"]
        name = row["method"] + (f", seed {row['seed']}" if row["seed"] else "")
        times = [f" {ratio[slug]['estimate']:.2f} |" if slug in ratio else " |" for ratio in latency.values()]
        lines.append(
            f"| {costs['macs'] / costs['dense_macs']:.1%} | {name} | {costs['params'] / costs['dense_params']:.1%} | "
            + " | ".join(cells)
            + " |"
            + "".join(times)
        )
    return lines


def _notes(part: dict) -> list[str]:
    lines = []
    for slug, notes in part["plans"].items():
        if notes.get("additivity", {}).get("pearson") is not None:
            found = notes["additivity"]
            lines.append(
                f"`{slug}`: additivity over {len(found['true'])} random sets: Pearson {found['pearson']:.3f}, "
                f"Spearman {found['spearman']:.3f}; chosen by {notes['selection']}."
            )
            break
    for slug in ("laptop-0@0.5", "laptop,-mse-0@0.5"):
        terms = part["rows"].get(slug, {}).get("terms")
        if terms:
            lines.append(
                f"`{slug}`: largest over smallest feature term {terms['spread']:,.0f}, features are "
                f"{terms['features_share']:.1%} of the loss."
            )
    return [line for line in lines for line in (line, "")]


def _vit(found: dict) -> list[str]:
    lines = [
        f"Dense accuracy {found['dense_accuracy']:.1%} on {found['test_images']:,} test pictures.",
        "",
        "| kept MACs | method | params | " + " | ".join(HEADS) + " |",
        "|---|---|---:|" + "---:|" * len(HEADS),
    ]
    for row in sorted(found["rows"].values(), key=lambda row: -row["keep"]):
        costs = row["costs"]
        cells = [f"{row['accuracy'][share]:.1%}" if share in row["accuracy"] else "" for share in SHARES]
        lines.append(
            f"| {costs['macs'] / costs['dense_macs']:.1%} | {row['method']} | "
            f"{costs['params'] / costs['dense_params']:.1%} | " + " | ".join(cells) + " |"
        )
    return lines


def _plots(part: dict, file: Path) -> None:
    """Captions all right along the recovery, and over what the plan saves, at batch 8 where time was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, front) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    half = [row for row in part["rows"].values() if row["keep"] == 0.5 and not row["seed"]]
    for row in half:
        shares = [share for share in SHARES if share in row["points"]]
        right = [row["points"][share]["all_right"]["estimate"] for share in shares]
        curves.plot([SHARES.index(share) for share in shares], right, marker="o", label=row["method"])
    curves.set_xticks(range(len(SHARES)), HEADS)
    curves.set_xlabel("samples of the recovery, as a share of the base's training")
    timed = part.get("latency", {}).get("batch 8", {}).get("ratio", {})
    for number, method in enumerate(dict.fromkeys(row["method"] for row in part["rows"].values())):
        for share, marker, filled in (("0", "o", "none"), ("0.01", "s", f"C{number}")):
            points = [
                (timed[slug]["estimate"] if timed else row["costs"]["macs"] / row["costs"]["dense_macs"], point)
                for slug, row in part["rows"].items()
                if row["method"] == method and not row["seed"] and (not timed or slug in timed)
                if (point := row["points"].get(share, {}).get("all_right", {}).get("estimate")) is not None
            ]
            if points:
                front.scatter(*zip(*points), marker=marker, facecolors=filled, edgecolors=f"C{number}")
    front.axhline(part["dense"]["all_right"]["estimate"], color="grey", linewidth=0.8)
    front.set_xlabel("time of a step at batch 8 / dense" if timed else "MACs / dense")
    front.set_title("hollow: one-shot; filled: after 1 %", fontsize=9)
    for axes in (curves, front):
        axes.set_ylabel("captions all right")
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
    curves.legend(fontsize=7)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
