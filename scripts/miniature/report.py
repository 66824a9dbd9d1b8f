"""The tables of `docs/miniature.md`, generated from `docs/results/miniature*.json`."""

from __future__ import annotations

import json
from pathlib import Path

BEGIN, END = "<!-- begin: generated from docs/results/{name}.json -->", "<!-- end: generated -->"
COLUMNS = ("object", "other", "count", "position", "size", "background", "texture", "all")


def write_report(docs: Path, name: str) -> None:
    """Replace what stands between a result's two markers in `docs/miniature.md` by tables of its figures.

    Raises:
        ValueError: the page has no markers.
    """
    result = json.loads((docs / "results" / f"{name}.json").read_text())
    page, begin = docs / "miniature.md", BEGIN.format(name=name)
    text = page.read_text()
    if begin not in text or END not in text.split(begin, 1)[1]:
        raise ValueError(f"{page} lacks the lines {begin!r} and {END!r}; put them where the tables belong")
    head, rest = text.split(begin, 1)
    page.write_text(head + begin + "\n\n" + tables(result) + "\n" + END + rest.split(END, 1)[1])


def tables(result: dict) -> str:
    """Markdown of the whole result."""
    return "\n".join([scores(result), ladder(result), facts(result), training(result)])


def scores(result: dict) -> str:
    n, sampler = result["sampler"]["n"], result["sampler"]
    lines = [
        f"**What {n} test captions became** ({sampler['scheduler']}, {sampler['steps']} steps, guidance "
        f"{sampler['guidance_scale']}; "
        "percent of the pictures whose caption says it; *all* = everything said is right):",
        "",
        "| pictures | " + " | ".join(COLUMNS) + " | KID | FD |",
        "|---|" + "---:|" * (len(COLUMNS) + 2),
    ]
    for name, row in result["rows"].items():
        cells = [f"{100 * row['grader'][column]:.1f}" for column in COLUMNS]
        cells += [f"{row['kid_miniature_grader']:.3f}", f"{row['fd_miniature_grader']:.2f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    chance = " | ".join(f"{100 * result['chance'][column]:.1f}" for column in COLUMNS)
    lines.append(f"| *chance: random train scenes* | {chance} | | |")
    low, high = (100 * value for value in result["all_right_interval_95"])
    lines += [
        "",
        f"KID and FD are on the grader's features, against {result['reference_scenes']} other real test scenes, so "
        "the row *real scenes* is their floor. "
        f"95 % interval of *all* for generated pictures: {low:.1f} to {high:.1f}. The smallest difference of two "
        f"independent scores that {n} captions detect (80 % power): "
        f"{100 * result['smallest_difference_in_all_right']:.1f} points.",
        "",
    ]
    return "\n".join(lines)


def ladder(result: dict) -> str:
    lines = [
        "**The ladder of the training itself** (averaged weights; every metric has to put it in order; test loss = "
        "squared error of what the denoiser predicts, on real test scenes):",
        "",
        "| step | pictures seen | object | all | KID | FD | test loss |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for rung in result["ladder"]:
        right = [f"{100 * rung['grader'][name]:.1f}" for name in ("object", "all")]
        distances = [f"{rung['kid_miniature_grader']:.3f}", f"{rung['fd_miniature_grader']:.2f}"]
        distances += [f"{rung['test_loss']:.4f}"]
        cells = [str(rung["step"]), str(rung["samples_seen"]), *right, *distances]
        lines.append("| " + " | ".join(cells) + " |")
    if result["half_width"]:
        row = result["half_width"]
        lines += [
            "",
            f"**At half the width**, the same recipe and {row['samples_seen']} pictures: object "
            f"{100 * row['grader']['object']:.1f} %, all {100 * row['grader']['all']:.1f} %, KID "
            f"{row['kid_miniature_grader']:.3f}, FD {row['fd_miniature_grader']:.2f}, "
            f"test loss {row['test_loss']:.4f}.",
        ]
    return "\n".join([*lines, ""])


def facts(result: dict) -> str:
    real, copying, held_out = result["grader_on_real_test_scenes"], result["copying"], result["held_out_pairs"]
    lines = [
        "**The grader on 4,000 real test scenes** (percent): "
        + ", ".join(f"{column} {100 * real[column]:.2f}" for column in COLUMNS)
        + ".",
        "",
        "**Colour pairs never seen in training**: all right "
        + ", ".join(
            f"{100 * row['all']:.1f} % of {row['n']} ({name.replace('_', ' ')})" for name, row in held_out.items()
        )
        + ".",
        "",
        "**Copying** (RMS distance in levels of 255 to the nearest of "
        f"{copying['training_pictures_searched']} training pictures):",
        "",
        "| pictures | median nearest | smallest nearest | copy rate (nearest < half of second) |",
        "|---|---:|---:|---:|",
    ]
    for name in ("generated", "real_test"):
        row = copying[name]
        rate = 100 * row["copy_rate_nearest_below_half_of_second"]
        lines.append(f"| {name.replace('_', ' ')} | {row['median_nearest']} | {row['min_nearest']} | {rate:.1f} % |")
    return "\n".join([*lines, ""])


def training(result: dict) -> str:
    lines = [
        f"**Cost** ({result['provenance']['device']}):",
        "",
        "| stage | parameters | steps | pictures seen | hours |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in result["training"].items():
        lines.append(f"| {name} | {row['parameters']} | {row['steps']} | {row['pictures_seen']} | {row['hours']} |")
    return "\n".join([*lines, ""])
