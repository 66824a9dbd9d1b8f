"""Figures, tables and curves of the comparison; generated from the JSON, never edited."""

from __future__ import annotations

import re
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


def write_page(docs: Path, result: dict) -> None:
    """Put the tables between the marks of `layers-compared.md`, and write the curves beside it."""
    lines = []
    for base, part in result["bases"].items():
        lines += [f"### {TITLES.get(base, base)}", "", *_table(part), "", *_notes(part), ""]
        picture = docs / "layers" / f"{base}.svg"
        _curves(part["rows"], picture)
        lines += [f"![Recovery at half the MACs, {base}]({picture.relative_to(docs)})", ""]
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
        if "additivity" in notes:
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
        f"Dense accuracy {found['dense_accuracy']:.1%} on the 10,000 test pictures.",
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


def _curves(rows: dict, file: Path) -> None:
    """Captions all right over the share of samples, at half the MACs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for row in rows.values():
        if row["keep"] != 0.5 or row["seed"]:
            continue
        shares = [share for share in SHARES if share in row["points"]]
        axes.plot(
            [SHARES.index(share) for share in shares],
            [row["points"][share]["all_right"]["estimate"] for share in shares],
            marker="o",
            label=row["method"],
        )
    axes.set_xticks(range(len(SHARES)), HEADS)
    axes.set_xlabel("samples of the recovery, as a share of the base's training")
    axes.set_ylabel("captions all right")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
