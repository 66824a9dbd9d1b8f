"""How the command line shows things: tables and error messages. The only place besides `cli.py` that prints."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from genprune.inspection import Inspection
from genprune.model_source import ModelSource
from genprune.plan import PruningPlan

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


def quiet_hosts() -> None:
    """Turn off the host libraries' loading bars: they would bury ours."""
    import warnings

    import diffusers
    import transformers

    # Diffusers before 0.41 knows only the name that later ones call deprecated.
    warnings.filterwarnings("ignore", message=".*`torch_dtype` is deprecated.*", category=FutureWarning)

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def print_json(data: Any) -> None:
    """Plain JSON on standard output, nothing else there."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def print_error(error: Exception) -> None:
    """One readable message on standard error: the type, then what the library says."""
    err.print(Text.assemble((type(error).__name__, "bold red"), ": ", str(error)))


def print_step(text: str) -> None:
    """A line about progress, on standard error so that `--json` stays clean."""
    err.print(Text(text, style="bold"))


def print_inspection(source: ModelSource, found: Inspection) -> None:
    """What a model holds, kind by kind, and how small it can get."""
    what = f"{found.host}" + (" (pruned)" if found.pruned else "")
    place = f", the {source.slot} of this pipeline" if source.slot else ""
    out.print(Text.assemble((source.name, "bold"), f": {what}{place}"))
    point = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in found.operating_point.items() if value)
    out.print(f"{count(found.params)} parameters, {count(found.macs)} MACs at {point}")
    if found.pruned:
        params, macs = found.params / found.dense_params, found.macs / found.dense_macs
        out.print(f"of the dense model: {params:.1%} of the parameters, {macs:.1%} of the MACs")
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ("kind", "sites", "units", "hold parameters", "hold MACs", "keep at least: params", "MACs")
    for column in columns:
        table.add_column(column, justify="left" if column == "kind" else "right")
    for row in found.kinds:
        table.add_row(
            row.kind,
            f"{row.sites:,}",
            f"{row.units:,}",
            f"{count(row.params)} ({row.params / found.dense_params:.0%})",
            f"{count(row.macs)} ({row.macs / found.dense_macs:.0%})",
            f"{row.least_params:.3f}",
            f"{row.least_macs:.3f}",
        )
    for label, least in found.least.items():
        table.add_row(label, "", "", "", "", f"{least['params']:.3f}", f"{least['macs']:.3f}", style="bold")
    out.print()
    out.print(table)
    out.print("\nKinds nest (heads in a branch in a block), so shares do not add up.")
    out.print("`default kinds` narrow layers; `branch`, `block` and `wrapper` remove whole modules: pass --kinds.")
    for name, reason in found.refused.items():
        out.print(Text.assemble(("cannot be cut ", "yellow"), name, ": ", reason))


def print_plan(plan: PruningPlan) -> None:
    """What a plan removes and what stays, in params, MACs and, where measured, milliseconds."""
    out.print(Text(str(plan)))


def print_methods(cards) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("method", "needs", "what it does"):
        table.add_column(column)
    for card in cards:
        table.add_row(card.name, ", ".join(card.needs) or "nothing", card.summary)
    out.print(table)


def count(value: int) -> str:
    """`401.64 G`, `859.52 M`, `12.3 k`: a large number with three to five digits."""
    for factor, letter in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= factor:
            return f"{value / factor:.2f} {letter}"
    return str(value)


def print_saved(source: ModelSource, path, plan_only: bool) -> None:
    """How to load what was written."""
    out.print()
    if plan_only:
        out.print(f"plan written to {path}; use it with:  gp.load_pipeline({source.place!r}, plan={str(path)!r})")
    elif source.kind == "pipeline":
        out.print(f"pruned pipeline written to {path}; load it with:")
        out.print(f"  import genprune; pipe = diffusers.DiffusionPipeline.from_pretrained({str(path)!r})")
    else:
        out.print(f"pruned model written to {path}; load it with:  genprune.load_model({str(path)!r})")


def print_demo(result: dict[str, Any], path) -> None:
    """The demo's overview, and where the page is."""
    from genprune.demo_page import overview

    glance = overview(result)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in glance.columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in glance.rows:
        table.add_row(*(cell or "" for cell in row))
    out.print(table)
    out.print(
        f"\nopen {path}/report.html; the pruned pipeline is in {path}/pipeline, every number in {path}/result.json"
    )


def print_bench(result: dict[str, Any], path) -> None:
    """Every measured value, a column a candidate, and where the page is."""
    names = [entry["name"] for entry in result["candidates"]]
    rows: dict[str, dict[str, float]] = {}
    for key, value in result["figures"].items():
        what, _, name = key.rpartition("/")
        if name in names:
            rows.setdefault(what, {})[name] = value
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", *names):
        table.add_column(column, justify="right" if column else "left")
    for what, values in rows.items():
        table.add_row(what, *(f"{values[name]:.5g}" if name in values else "" for name in names))
    out.print(table)
    out.print(f"\nopen {path}/report.html; every number in {path}/result.json")
