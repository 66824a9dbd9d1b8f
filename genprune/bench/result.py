"""The result of a benchmark as JSON: figures, and everything needed to get them again."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from genprune.bench.errors import BadResult
from genprune.files import whole_file
from genprune.metrics.device import device_name

FORMAT_VERSION = 1
PACKAGES = ("torch", "diffusers", "transformers", "timm", "accelerate", "torchmetrics", "open-clip-torch", "numpy")
# section -> type; a result without one of them cannot be rerun, so it is none
SCHEMA = {
    "format_version": int,
    "kind": str,
    "command": str,
    "created": str,
    "commit": str | None,
    "versions": dict,
    "device": dict,
    "seeds": dict,
    "data": dict,
    "sampling": dict,
    "extractors": list,
    "candidates": list,
    "measurements": list,
    "figures": dict,
    "run_to_run": list,
}


def environment(device: torch.device | str = "cpu", processes: int = 1) -> dict:
    """Command, commit, versions and hardware: the sections of a result that no metric gives."""
    return {
        "format_version": FORMAT_VERSION,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), "genprune": _genprune_version()}
        | {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "device": {
            "name": device_name(device),
            "type": torch.device(device).type,
            "threads": torch.get_num_threads(),
            "cpu_count": os.cpu_count(),
            "processes": processes,
            "platform": f"{platform.system()} {platform.machine()}",
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _genprune_version() -> str:
    import genprune

    return genprune.__version__


def _commit() -> str | None:
    """The checkout's commit, with `-dirty` when tracked files differ; None for an installed package."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


def check_result(result: object) -> dict:
    """The result itself when it is complete.

    Raises:
        BadResult: a section is missing or has another type, a figure is no finite number, or the format is newer.
    """
    if not isinstance(result, dict):
        raise BadResult(f"the result is a {type(result).__name__}, expected a JSON object written by genprune bench.")
    version = result.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise BadResult(f"the result has format {version}, this genprune reads up to {FORMAT_VERSION}. Upgrade it.")
    for section, kind in SCHEMA.items():
        if section not in result:
            raise BadResult(f"the result has no section '{section}'. Run the benchmark again.")
        if not isinstance(result[section], kind):
            raise BadResult(
                f"section '{section}' is a {type(result[section]).__name__}, expected {kind}. Run the benchmark again."
            )
    for name, value in result["figures"].items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise BadResult(f"figure '{name}' is {value!r}, expected a finite number. Check the run that produced it.")
    unknown = set(result["run_to_run"]) - set(result["figures"])
    if unknown:
        raise BadResult(f"run_to_run names figures that do not exist: {sorted(unknown)}.")
    return result


def write_result(path: str | os.PathLike, result: dict) -> Path:
    """Check the result and write it whole, keys in their order, two spaces deep."""
    text = json.dumps(check_result(result), indent=2, ensure_ascii=False, allow_nan=False)
    with whole_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return Path(path)


def read_result(path: str | os.PathLike) -> dict:
    """A result from disk, checked.

    Raises:
        BadResult: the file is no JSON or no complete result.
    """
    try:
        return check_result(json.loads(Path(path).read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise BadResult(f"{path} is no JSON ({error}). It may be truncated: run the benchmark again.") from error


def repeatable(result: dict) -> dict:
    """The part of a result that the same command must give again: without dates, times and memory."""
    kept = {name: value for name, value in result.items() if name not in ("created", "run_to_run", "speed", "memory")}
    kept["figures"] = {
        name: value for name, value in result["figures"].items() if name not in set(result["run_to_run"])
    }
    return kept
