"""Figures and tables of the comparison; generated from the JSON, never edited."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genprune.files import whole_file
from scripts.tokens.candidates import MAIN

MARK = "<!-- begin: generated from docs/results/tokens.json -->", "<!-- end: generated -->"
TASKS = {"fashion": "Fashion-MNIST, enlarged to 224 px", "emoji": "Groups of Fluent 3-D emoji"}
HEADINGS = {
    "methods": "Methods",
    "ablation": "Stages of the method",
    "reduction": "How tokens go, and where",
}


def figures(parts: dict[str, Any]) -> dict[str, float]:
    """The named figures of all parts that are there."""
    found: dict[str, float] = {}
    if "speed" in parts:
        from scripts.tokens.speed import speed_figures

        found |= speed_figures(parts["speed"]["found"])
    if "accuracy" in parts:
        tasks = parts["accuracy"]["found"]
        differences = {}
        for task, table in tasks.items():
            pair = table["against_tome"].get(f"default @ {MAIN:g}")
            if pair:
                differences[task] = pair["estimate"]
            for row in table["rows"]:
                if row["name"] in ("default", "ToMe") and row["keep"] == MAIN:
                    found[f"accuracy_{task}_{row['name'].lower()}"] = row["accuracy"]
            found[f"accuracy_{task}_dense"] = table["rows"][0]["accuracy"]
        if differences:
            found["accuracy_difference_vs_tome"] = sum(differences.values()) / len(differences)
            found |= {f"accuracy_difference_vs_tome_{task}": value for task, value in differences.items()}
    if "classifier" in parts:
        table = parts["classifier"]["found"]["test"]
        found["accuracy_classifier_dense"] = table["rows"][0]["accuracy"]
        if pair := table["against_tome"].get(f"default @ {MAIN:g}"):
            found["accuracy_difference_vs_tome_classifier"] = pair["estimate"]
    if "diffusion" in parts:
        from scripts.tokens import diffusion

        found |= getattr(diffusion, "diffusion_figures", lambda found: {})(parts["diffusion"]["found"])
    return found


def write_page(docs: Path, result: dict[str, Any]) -> None:
    """Put the tables between the marks of `tokens-compared.md`."""
    page = docs / "tokens-compared.md"
    text = page.read_text(encoding="utf-8")
    begin, end = text.index(MARK[0]) + len(MARK[0]), text.index(MARK[1])
    lines = page_lines(result)
    with whole_file(page) as temporary:
        temporary.write_text(text[:begin] + "\n\n" + "\n".join(lines).rstrip() + "\n\n" + text[end:], encoding="utf-8")


def page_lines(result: dict[str, Any]) -> list[str]:
    """All tables that the result has the parts for."""
    parts = {name: part["found"] for name, part in result["parts"].items()}
    lines: list[str] = []
    if "speed" in parts:
        lines += _overheads(parts["speed"]["overhead"]) + _equal_macs(parts["speed"]["equal_macs"])
    times = {name: ratio["estimate"] for name, ratio in parts.get("times", {}).get("ratio", {}).items()}
    for task, table in parts.get("accuracy", {}).items():
        lines += [f"### {TASKS.get(task, task)}", "", *_introduced(table), *_rows(table, times)]
    if "classifier" in parts:
        table = parts["classifier"]["test"]
        lines += ["### A ViT classifier on Fashion-MNIST, trained here", ""]
        lines += [f"{table['pictures']['test']:,} test pictures of 28 px, 196 patches and a class token.", ""]
        lines += [*_rows(table, {}), *_fine_tuning(table.get("fine_tuning"))]
    if "tuning" in parts or "dev" in parts.get("classifier", {}):
        tables = dict(parts.get("tuning", {}))
        if "dev" in parts.get("classifier", {}):
            tables["classifier"] = parts["classifier"]["dev"]
        lines += _tuning(tables)
    if "diffusion" in parts:
        from scripts.tokens import diffusion

        lines += getattr(diffusion, "diffusion_lines", lambda found: [])(parts["diffusion"])
    return lines


def _overheads(tables: dict[str, Any]) -> list[str]:
    lines = ["### What choosing tokens costs", ""]
    lines += ["Three pruning layers (after blocks 2, 5 and 8, keeping .9, .8 and .7 of the patches).", ""]
    lines += ["| model | method | dense, ms | alone, of dense | inside, of dense |", "|---|---|---:|---:|---:|"]
    for name, table in tables.items():
        for method, share in table["share"].items():
            lines.append(
                f"| {name} | {method} | {table['median_ms']['dense']:.0f} | {_interval(share['alone'])} | "
                f"{_interval(share['inside'])} |"
            )
    return [*lines, ""]


def _equal_macs(tables: dict[str, Any]) -> list[str]:
    lines = [f"### Wall time at {MAIN:.0%} of the MACs", "", "Time over that of the dense model in the same turn.", ""]
    names = [name for name in next(iter(tables.values()))["ratio"] if name != "dense"]
    lines += ["| method | " + " | ".join(tables) + " |", "|---|" + "---:|" * len(tables)]
    cell = "{:.0f} ms".format
    lines.append("| dense | " + " | ".join(cell(table["median_ms"]["dense"]) for table in tables.values()) + " |")
    for name in names:
        cells = [_estimate(table["ratio"].get(name)) for table in tables.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name in next(iter(tables.values()))["between"]:
        cells = [_interval(table["between"].get(name)) for table in tables.values()]
        lines.append(f"| *{name}* | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _introduced(table: dict[str, Any]) -> list[str]:
    dense = table["rows"][0]
    pictures = table["pictures"]
    return [
        f"Probes trained on {pictures['train']:,} pictures, {pictures['test']:,} test pictures. Dense: class token "
        f"{dense['accuracy']:.1%}, mean of patches {dense['patches']:.1%}.",
        "",
    ]


def _rows(table: dict[str, Any], times: dict[str, float]) -> list[str]:
    """Accuracy of every candidate at every share, a heading for each group."""
    lines: list[str] = []
    with_patches = "patches" in table["rows"][0]
    for group, heading in HEADINGS.items():
        rows = [row for row in table["rows"] if row["group"] == group]
        if not rows:
            continue
        head = ["kept MACs", heading.lower(), "accuracy", "minus dense, points", "same answer", "cosine"]
        head += ["patches' probe"] * with_patches + ["minus ToMe, points"] * (group == "methods")
        head += ["time / dense"] * bool(times)
        lines += ["| " + " | ".join(head) + " |", "|---:|---|" + "---:|" * (len(head) - 2)]
        for row in sorted(rows, key=lambda row: -(row["keep"] or row["macs_share"])):
            label = f"{row['name']} @ {row['keep']:g}" if row["keep"] else row["name"]
            cells = [
                f"{row['macs_share']:.1%}",
                row["name"],
                f"{row['accuracy']:.1%}",
                _points(row["accuracy difference"]),
                f"{row['accuracy agreement']:.1%}",
                f"{row['cosine']:.3f}",
            ]
            if with_patches:
                cells.append(f"{row['patches']:.1%}")
            if group == "methods":
                cells.append(_points(table.get("against_tome", {}).get(label)))
            if times:
                cells.append(f"{times[label]:.2f}" if label in times else "")
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def _fine_tuning(found: dict[str, Any] | None) -> list[str]:
    if not found:
        return []
    lines = [
        f"Fine-tuning for {found['steps']} steps of {found['batch']} pictures, tokens pruned to {found['keep']:.0%} "
        "of the MACs all along:",
        "",
        "| | before | after | after, with all tokens |",
        "|---|---:|---:|---:|",
    ]
    for name, row in found.items():
        if isinstance(row, dict):
            dense = row.get("after, all tokens")
            last = f"{dense:.1%}" if dense is not None else ""
            lines.append(f"| {name} | {row['before']:.1%} | {row['after']:.1%} | {last} |")
    return [*lines, ""]


def _tuning(tables: dict[str, Any]) -> list[str]:
    """What the defaults were chosen from: the score and the share of the similarity stage, on dev pictures."""
    first = next(iter(tables.values()))
    pictures = {name: table["pictures"]["dev"] for name, table in tables.items()}
    lines = ["### What the defaults were chosen from", ""]
    lines += ["Dev pictures: " + ", ".join(f"{name} {count:,}" for name, count in pictures.items()) + ". ", ""]
    lines += [f"{MAIN:.0%} of the MACs. Cells: accuracy / cosine to the dense features.", ""]
    lines += ["| | " + " | ".join(tables) + " |", "|---|" + "---:|" * len(tables)]
    for name in [row["name"] for row in first["rows"]]:
        cells = []
        for table in tables.values():
            row = next((r for r in table["rows"] if r["name"] == name), None)
            cells.append(f"{row['accuracy']:.1%} / {row['cosine']:.4f}" if row else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _estimate(found: dict[str, Any] | None) -> str:
    return f"{found['estimate']:.2f}" if found else ""


def _interval(found: dict[str, Any] | None) -> str:
    return f"{found['estimate']:.3f} [{found['low']:.3f}, {found['high']:.3f}]" if found else ""


def _points(found: dict[str, Any] | None) -> str:
    if not found:
        return ""
    low, high = 100 * found["low"], 100 * found["high"]
    return f"{100 * found['estimate']:+.1f} [{low:+.1f}, {high:+.1f}]"
