"""The demo's page: pictures first, one paragraph for a newcomer, then the figures behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genprune.bench.compare import CONTROLS
from genprune.bench.page import bar_charts, metric_tables
from genprune.bench.report import PictureGrid, Table, write_report
from genprune.bench.run import image_path

SHOWN = 10  # prompts in the picture grid
GRADE = "grade(attributes)"


def write_demo_page(path: Path, result: dict[str, Any], images: Path) -> Path:
    """Write `report.html` of a demo result whose pictures lie in `images/NAME/`."""
    from genprune import miniature

    names = [entry["name"] for entry in result["candidates"]]
    settings = result["demo"]
    prompts = miniature.prompts("test", min(SHOWN, settings["prompts"]), settings["seed"])
    return write_report(
        path,
        f"What is left of a text-to-image model at {settings['keep']:.0%} of its {_OF[settings['of']]}",
        paragraph(result),
        pictures=PictureGrid(
            prompts,
            {name: [image_path(images / name, index) for index in range(len(prompts))] for name in names},
            note="Each row starts from the same noise, so every difference is what pruning changed. 64 px pictures.",
        ),
        bars=bar_charts(result),
        tables=[overview(result), *metric_tables(result)],
        details=_details(result),
        footer=f"genprune {result['versions']['genprune']}, {result['created']}. Every number: result.json beside "
        "this page. The miniature is a small model trained for this package: no claim about a large one.",
    )


_OF = {"macs": "arithmetic", "params": "parameters", "units": "units"}


def paragraph(result: dict[str, Any]) -> str:
    """What was done and what came of it, for someone who has never pruned a model. Honest about the damage."""
    figures, settings = result["figures"], result["demo"]
    ratio = figures.get("denoiser_latency_ratio/taylor")
    speed = "" if ratio is None else f" On this machine a denoising step takes {ratio:.0%} of the time it took."
    done = (
        f"This small text-to-image model draws emoji scenes from captions. Pruning removed the parts of its "
        f"denoiser that mattered least on {settings['calibration_prompts']} example scenes (Taylor scores), until "
        f"{figures['macs_ratio/taylor']:.0%} of the arithmetic and {figures['params_ratio/taylor']:.0%} of the "
        f"parameters were left.{speed} The smaller model is real: it was saved, and loaded again by the ordinary "
        f"DiffusionPipeline.from_pretrained"
        + (", bit for bit." if settings["reload_is_exact"] else ", NOT bit for bit.")
    )
    return f"{done}\n\n{_damage(result)}"


def _damage(result: dict[str, Any]) -> str:
    figures = result["figures"]
    if f"{GRADE}/taylor" not in figures:
        return "How much the pictures suffered is in the tables below."
    grades = {name: figures[f"{GRADE}/{name}"] for name in ("dense", "taylor", "recovered", "magnitude", "random")}
    chance = figures.get(f"{GRADE}/shuffled prompts")
    told = "" if chance is None else f" (in pictures of other captions: {chance:.0%})"
    return (
        f"{_verdict(figures, grades)} A grader network that reads objects, counts, places and backgrounds back from a "
        f"picture finds {grades['dense']:.0%} of what the caption says in the dense model's pictures and "
        f"{grades['taylor']:.0%} in the pruned model's{told}. Removing as much by weight magnitude leaves "
        f"{grades['magnitude']:.0%}, at random {grades['random']:.0%}.\n\n{_recovery(result, grades)}"
    )


def _recovery(result: dict[str, Any], grades: dict[str, float]) -> str:
    """What the brief training after the cut did, better or worse."""
    figures, recovery = result["figures"], result["demo"]["recovery"]
    psnr = [figures.get(f"PSNR to dense (dB)/{name}") for name in ("random", "recovered")]
    likeness = (
        "" if None in psnr else f", and likeness to the dense model's pictures from {psnr[0]:.1f} to {psnr[1]:.1f} dB"
    )
    worse = grades["recovered"] < grades["random"] or (None not in psnr and psnr[1] < psnr[0])
    ending = (
        "So brief a training did not help here: the first steps move the model."
        if worse
        else "So brief a training is a start; `genprune recover` goes on."
    )
    return (
        f"That was the cut alone. The row 'recovered' is the model that was cut at random after "
        f"{recovery['seconds']:.0f} seconds of training against the dense one, on {recovery['rows']:,} scenes that no "
        f"picture here comes from: what the grader finds goes from {grades['random']:.0%} to "
        f"{grades['recovered']:.0%}{likeness}. {ending}"
    )


def _verdict(figures: dict[str, float], grades: dict[str, float]) -> str:
    """One sentence about the damage, no stronger than the figures: a loss, or none that this measure could see."""
    high = figures.get(f"{GRADE}/taylor - dense/high")
    psnr = figures.get("PSNR to dense (dB)/taylor")
    if high is not None and high < 0:
        return "It is not free."
    likeness = "" if psnr is None else f" (likeness to the dense model's: {psnr:.0f} dB)"
    if min(grades["dense"], grades["taylor"]) > 0.98:
        return f"At this budget no damage shows in what is drawn{likeness}; a smaller --keep will show some."
    return f"What was lost is within chance for this few pictures{likeness}."


def overview(result: dict[str, Any]) -> Table:
    """One row a candidate: what it costs and how good its pictures are."""
    figures = result["figures"]
    columns = {
        "params": lambda name: _share(figures, f"params_ratio/{name}"),
        "MACs": lambda name: _share(figures, f"macs_ratio/{name}"),
        "step": lambda name: _unit(figures, f"denoiser_latency_ms/{name}", 1, "ms"),
        "memory": lambda name: _unit(figures, f"peak_memory_bytes/{name}", 2**20, "MiB"),
        "caption": lambda name: _share(figures, f"{GRADE}/{name}"),
        "KID": lambda name: _number(figures, f"KID(miniature-grader)/{name}"),
        "PSNR": lambda name: _unit(figures, f"PSNR to dense (dB)/{name}", 1, "dB"),
    }
    names = [*(entry["name"] for entry in result["candidates"]), *CONTROLS]
    rows = [(name, *(cell(name) for cell in columns.values())) for name in names]
    floor = figures.get("KID(miniature-grader)/floor")
    note = (
        "caption: share of what it says that the grader finds. KID: distance to real scenes. PSNR: likeness to the "
        "dense model's picture. memory: peak of a process, its libraries included. The last rows are no models: they "
        "show what each measure gives for pictures that ignore the caption. recovered: the cut at "
        f"random, then {result['demo']['recovery_steps']} steps of training."
    )
    if floor is not None:
        note += f" Two sets of real pictures have a KID of {floor:.4f}: that is its zero."
    return Table("At a glance", ("", *columns), rows, note=note)


def _share(figures: dict, key: str) -> str | None:
    return f"{figures[key]:.1%}" if key in figures else None


def _unit(figures: dict, key: str, scale: float, unit: str) -> str | None:
    return f"{figures[key] / scale:.1f} {unit}" if key in figures else None


def _number(figures: dict, key: str) -> str | None:
    return f"{figures[key]:.4f}" if key in figures else None


def _details(result: dict[str, Any]) -> dict[str, object]:
    device, settings = result["device"], result["demo"]
    return {
        "command": result["command"],
        "commit": result["commit"],
        "device": f"{device['name']}, {device['threads']} threads",
        "budget": f"keep {settings['keep']} of {settings['of']}, seed {settings['seed']}",
        "prompts": f"{settings['prompts']} captions of the test split, scored on others of the dev split",
        "recovery": f"{settings['recovery_steps']} steps of {settings['recovery_batch']} scenes of the train split, "
        f"learning rate {settings['recovery']['settings']['learning_rate']:g}",
        "sampling": result["sampling"],
        "plans agree": {name: f"{share:.0%}" for name, share in settings["overlap_with_taylor"].items()},
        "versions": result["versions"],
    }
