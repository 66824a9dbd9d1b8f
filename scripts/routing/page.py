"""The tables of docs/routing-compared.md, and the main figures, from what the comparison found."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from genprune.files import whole_file
from genprune.metrics import paired_difference

TITLES = {"unet": "Miniature A, U-Net", "mmdit": "Miniature B, MMDiT"}
QUALITY = ("<!-- quality: scripts/bench_routing.py -->", "<!-- end of quality -->")
SERVING = ("<!-- serving: scripts/bench_routing.py -->", "<!-- end of serving -->")
AGAINST = ("1 expert", "EcoDiff")


def quality_figures(bases: dict[str, Any]) -> dict[str, float]:
    """Share of captions all right of every candidate, and paired differences to one expert and to EcoDiff."""
    figures = {}
    for base, part in bases.items():
        for keep, rows in _budgets(part).items():
            for label, row in rows.items():
                for share, point in row["points"].items():
                    name = re.sub(r"[^a-z0-9]+", "_", f"{base} {label} keep {keep}".lower()) + f"_at_{share}"
                    figures[f"all_right_{name}"] = point["all_right"]["estimate"]
                    for other in AGAINST:
                        found = _difference(row, rows.get(other), share)
                        if found is not None and other != label:
                            figures[f"less_{other.lower().replace(' ', '_')}_{name}"] = found["estimate"]
    return figures


def write_quality(page: Path, bases: dict[str, Any]) -> None:
    """Put the tables of quality between their marks."""
    lines = []
    for base, part in bases.items():
        lines += [f"### {TITLES.get(base, base)}", "", *_dense(part), ""]
        for keep, rows in sorted(_budgets(part).items(), reverse=True):
            lines += [f"**{float(keep):.0%} of the MACs on average**", "", *_table(rows), ""]
        lines += [*_difficulty(part), "", *_map(part), ""]
    _between(page, QUALITY, lines)


def write_serving(page: Path, lines: list[str]) -> None:
    """Put what serving costs between its marks."""
    _between(page, SERVING, lines)


def _between(page: Path, marks: tuple[str, str], lines: list[str]) -> None:
    text = page.read_text()
    begin, end = text.index(marks[0]) + len(marks[0]), text.index(marks[1])
    with whole_file(page) as temporary:
        temporary.write_text(text[:begin] + "\n\n" + "\n".join(lines).strip() + "\n\n" + text[end:])


def _budgets(part: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {keep: rows for keep, rows in part.items() if keep not in ("dense", "controls")}


def _dense(part: dict[str, Any]) -> list[str]:
    dense = part["dense"]
    lines = [
        "| | captions all right | KID | R@1 |",
        "|---|---:|---:|---:|",
        f"| dense | {_percent(dense['all_right'])} | {dense['kid']:.3f} | {dense['R@1']:.0%} |",
    ]
    for name, row in part["controls"].items():
        lines.append(f"| {name} | {_percent(row['all_right'])} | {row['kid']:.3f} | {row['R@1']:.0%} |")
    return lines


def _table(rows: dict[str, Any]) -> list[str]:
    points = sorted({share for row in rows.values() for share in row["points"]}, key=float)
    heads = "".join(f" right, {_point(share)} | PSNR | KID | R@1 |" for share in points)
    lines = [
        f"| method | MACs, test captions | params | {heads} less 1 expert | less EcoDiff |",
        "|---|---:|---:|" + "---:|" * (4 * len(points) + 2),
    ]
    for label, row in rows.items():
        cells = ""
        for share in points:
            point = row["points"].get(share)
            if point is None:
                cells += " | | | |"
                continue
            cells += (
                f" {_percent(point['all_right'])} | {point['psnr']['estimate']:.1f} | {point['kid']:.3f} | "
                f"{point['R@1']:.0%} |"
            )
        params = _range([100 * value for value in row["params"]])
        less = []
        for other in AGAINST:
            found = None if label == other else _difference(row, rows.get(other), points[-1])
            less.append("" if found is None else _points(found))
        lines.append(f"| {label} | {row['test_share']:.1%} | {params} % |{cells} {' | '.join(less)} |")
    return lines


def _difference(row: dict[str, Any], other: dict[str, Any] | None, share: str) -> dict[str, float] | None:
    """Paired difference in captions all right, with its bootstrap interval."""
    if other is None or share not in row["points"] or share not in other["points"]:
        return None
    one, two = (torch.tensor(each["points"][share]["right"], dtype=torch.float64) for each in (row, other))
    return paired_difference(one, two).to_json()


def _difficulty(part: dict[str, Any]) -> list[str]:
    lines = [
        "Rank correlation of a prompt's budget with how badly the dense model denoises its picture, and with the "
        "number of objects in it (Spearman, 95 % interval):",
        "",
        "| kept | router | denoising error | objects | experts' MACs |",
        "|---|---|---:|---:|---|",
    ]
    for keep, rows in sorted(_budgets(part).items(), reverse=True):
        for label, row in rows.items():
            if "difficulty" in row:
                found = [_correlation(row["difficulty"][name]) for name in ("denoising_error", "number_of_objects")]
                shares = ", ".join(f"{100 * value:.0f}" for value in row["shares"])
                lines.append(f"| {float(keep):.0%} | {label} | {' | '.join(found)} | {shares} % |")
    return lines


def _map(part: dict[str, Any]) -> list[str]:
    """Which prompts go where: of the routers with most experts at the smaller budget."""
    for rows in sorted(_budgets(part).items()):
        row = next((each for label, each in rows[1].items() if label == "8 experts" and "map" in each), None)
        if row is None:
            continue
        captions = sum(each["prompts"] for each in row["map"])
        lines = [
            f"Where {captions} test captions go, 8 experts at {float(rows[0]):.0%}:",
            "",
            "| expert | MACs | captions | kinds of scene | words most typical of it |",
            "|---:|---:|---:|---|---|",
        ]
        for number, each in enumerate(row["map"]):
            kinds = ", ".join(f"{kind} {count}" for kind, count in each["kinds"].items())
            lines.append(
                f"| {number} | {each['share']:.1%} | {each['prompts']} | {kinds} | {', '.join(each['words'])} |"
            )
        return lines
    return []


def _correlation(found: dict[str, float] | None) -> str:
    if found is None:
        return "same budget"
    return f"{found['estimate']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def _percent(interval: dict[str, float]) -> str:
    return f"{interval['estimate']:.0%} [{100 * interval['low']:.0f}, {100 * interval['high']:.0f}]"


def _points(found: dict[str, float]) -> str:
    return f"{100 * found['estimate']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.0f}" if high - low < 1 else f"{low:.0f} to {high:.0f}"


def _point(share: str) -> str:
    return "as cut" if float(share) == 0 else f"after {float(share):.0%}"
