"""The report of a benchmark: a result and its pictures, laid out with `report.write_report`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from genprune.bench.compare import CONTROLS
from genprune.bench.data import BenchData
from genprune.bench.report import BarChart, PictureGrid, Table, write_report
from genprune.bench.run import image_path

SHOWN = 8  # prompts in the picture grid


def write_page(path: Path, result: dict, folders: Mapping[str, Path], data: BenchData) -> Path:
    """Write the HTML report of a benchmark result."""
    reference = result["reference"]
    shown = min(SHOWN, len(data.prompts))
    return write_report(
        path,
        "Dense and pruned, side by side",
        summary(result),
        pictures=PictureGrid(
            data.prompts[:shown],
            {name: [image_path(folder, index) for index in range(shown)] for name, folder in folders.items()},
            note="Every candidate starts from the same noise, so what differs is what pruning changed.",
        ),
        bars=bar_charts(result),
        tables=[_cost_table(result), *metric_tables(result)],
        details=_details(result),
        footer=f"Written by genprune {result['versions']['genprune']} on {result['created']}. Reference: {reference}.",
    )


def summary(result: dict) -> str:
    """One paragraph: what was compared, what it costs now, what became of the pictures."""
    figures, reference = result["figures"], result["reference"]
    sentences = [
        f"{len(result['candidates'])} versions of one text-to-image model drew the same {result['data']['prompts']} "
        f"prompts from the same noise. '{reference}' is what the others are compared with."
    ]
    for entry in result["candidates"]:
        name = entry["name"]
        if name == reference:
            continue
        kept = [
            f"{100 * figures[key]:.0f} % of its {what}"
            for key, what in ((f"params_ratio/{name}", "parameters"), (f"macs_ratio/{name}", "arithmetic"))
            if key in figures
        ]
        sentence = f"'{name}' keeps {' and '.join(kept)}"
        ratio = result["speed"].get("denoiser", {}).get("ratio", {}).get(name)
        if ratio is not None and ratio["low"] <= 1 <= ratio["high"]:
            sentence += ", with no difference in speed that could be measured here"
        elif ratio is not None:
            sentence += f", and a denoising step takes {ratio['estimate']:.2f} times as long"
        psnr = figures.get(f"PSNR to {reference} (dB)/{name}")
        if psnr is not None:
            sentence += f"; its pictures are {_closeness(psnr)} ({psnr:.1f} dB PSNR)"
        sentences.append(sentence + ".")
    return " ".join(sentences)


def _closeness(psnr_db: float) -> str:
    """A word for a mean PSNR; the bounds are those of what one sees at arm's length."""
    bounds = ((99.9, "identical"), (35, "hard to tell apart"), (25, "close, with small changes"), (15, "changed"))
    return next((word for bound, word in bounds if psnr_db >= bound), "very different")


def bar_charts(result: dict) -> list[BarChart]:
    """Ratios to the reference: parameters, MACs, latency, memory."""
    figures, reference = result["figures"], result["reference"]
    names = [entry["name"] for entry in result["candidates"]]
    quantities = {
        "Parameters": "params_ratio",
        "Arithmetic (MACs)": "macs_ratio",
        "Time of a denoising step": "denoiser_latency_ratio",
        "Time from prompt to picture": "pipeline_latency_ratio",
        "Peak memory": "peak_memory_ratio",
    }
    groups, intervals = {}, {}
    for label, key in quantities.items():
        values = {name: figures[f"{key}/{name}"] for name in names if f"{key}/{name}" in figures}
        if values:
            groups[label] = values
    for label, what in (("Time of a denoising step", "denoiser"), ("Time from prompt to picture", "pipeline")):
        ratios = result["speed"].get(what, {}).get("ratio", {})
        intervals[label] = {name: (r["low"], r["high"]) for name, r in ratios.items() if name != reference}
    device = result["device"]
    note = f"{reference} = 1; shorter is better. Times on {device['name']}, {device['threads']} threads."
    return [BarChart("Cost, relative", groups, baseline=reference, note=note, intervals=intervals)] if groups else []


def _cost_table(result: dict) -> Table:
    rows = []
    for entry in result["candidates"]:
        name = entry["name"]
        latency = result["figures"].get(f"denoiser_latency_ms/{name}")
        peak = result["figures"].get(f"peak_memory_bytes/{name}")
        rows.append(
            (
                name,
                f"{entry['params'] / 1e6:.2f} M",
                None if entry["macs"] is None else f"{entry['macs'] / 1e9:.3f} G",
                None if latency is None else f"{latency:.1f} ms",
                None if peak is None else f"{peak / 2**20:.0f} MiB",
            )
        )
    return Table(
        "Cost",
        ("candidate", "parameters", "MACs", "step", "peak memory"),
        rows,
        note="Of the denoiser, per call. Peak memory: a fresh process, libraries included, that loads and draws.",
    )


def metric_tables(result: dict) -> list[Table]:
    """One table a metric: value, 95 % interval, paired difference to the reference, floor."""
    metrics: dict[str, list[dict]] = {}
    for row in result["measurements"]:
        metrics.setdefault(row["metric"], []).append(row)
    return [_metric_table(metric, rows, result["reference"]) for metric, rows in metrics.items()]


def _metric_table(metric: str, rows: list[dict], reference: str) -> Table:
    columns = ["candidate", "value"]
    intervals, differences = any(row["interval"] for row in rows), any(row["difference"] for row in rows)
    columns += ["95 % interval"] * intervals + [f"minus {reference}"] * differences
    cells = []
    for row in rows:
        name = f"(control) {row['candidate']}" if row["candidate"] in CONTROLS else row["candidate"]
        cell = [name, f"{row['value']:.4g}"]
        cell += [_range(row["interval"])] * intervals
        cell += [
            row["difference"] and f"{row['difference']['estimate']:+.4g} {_range(row['difference'])}"
        ] * differences
        cells.append(cell)
    note = "Higher is better." if rows[0]["higher_is_better"] else "Lower is better."
    if differences:
        note += f" 'minus {reference}' is the mean difference over the same prompts and seeds, with its 95 % interval."
    floor = rows[0]["floor"]
    if floor:
        note += (
            f" Real pictures against other real pictures score {floor['mean']:.4g} ({floor['low']:.4g} to "
            f"{floor['high']:.4g}, {floor['size']} a side): below that there is nothing to see."
        )
    return Table(metric, columns, cells, note=note)


def _range(interval: dict | None) -> str | None:
    return interval and f"[{interval['low']:.4g}, {interval['high']:.4g}]"


def _details(result: dict) -> dict:
    device = result["device"]
    details = {
        "command": result["command"],
        "commit": result["commit"],
        "device": f"{device['name']}, {device['threads']} threads, {device['processes']} processes",
        "data": {name: value for name, value in result["data"].items() if value is not None},
        "sampler": ", ".join(sorted({entry["sampler"] for entry in result["candidates"]})),
        "sampling": result["sampling"],
        "extractors": "; ".join(
            f"{card['name']} ({card['weights_hash'][:19]}..., {card['resize']} to {card['image_size']} px)"
            for card in result["extractors"]
        )
        or None,
        "plan hashes": {entry["name"]: entry["plan_hash"] for entry in result["candidates"] if entry["plan_hash"]},
        "versions": result["versions"],
    }
    return {name: value for name, value in details.items() if value}
