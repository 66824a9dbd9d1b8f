"""Memory and time of a differentiated denoising chain against its length: plain, checkpointed by step, and genprune.

    python scripts/bench_checkpointing.py --quick --out checkpointing.json      # under 5 minutes on 2 CPU cores
    python scripts/bench_checkpointing.py --out docs/results/checkpointing.json --table docs/checkpointing.md

Weights are random, so nothing here speaks of quality. Every case runs in a process of its own, so that its peak memory
is not hidden by what another left behind; times are taken in one process, the ways in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.fresh_process import in_fresh_process  # noqa: E402

QUICK = {"latent_size": 16, "naive": (5,), "step_checkpoints": (5,), "ours": (5, 50), "steps": 4, "rounds": 3}
FULL = {
    "latent_size": 32,
    "naive": (2, 5, 10),
    "step_checkpoints": (5, 10, 25, 50),
    "ours": (5, 10, 25, 50),
    "steps": 5,
    "rounds": 7,
}
SD15_STEPS = (5, 50)  # full size, ours alone: plain backpropagation does not fit


def cases(quick: bool) -> list[dict[str, Any]]:
    """Everything to run, smallest first."""
    size = QUICK if quick else FULL
    found = []
    for host in ("dit", "unet"):
        shared = {"name": host, "latent_size": size["latent_size"]}
        found.append({"kind": "speed", **shared, "steps": size["steps"], "rounds": size["rounds"]})
        for way in ("naive", "step_checkpoints", "ours"):
            found += [{"kind": "memory", **shared, "way": way, "steps": steps} for steps in size[way]]
    if not quick:
        sd15 = {"kind": "memory", "name": "sd15", "latent_size": 32, "way": "ours"}
        found += [{**sd15, "steps": steps} for steps in SD15_STEPS]
    return found


def run_case(case: dict[str, Any], device: str) -> dict[str, Any]:
    """One case, in this process."""
    from scripts.checkpointing.measure import run_memory, run_speed

    given = {name: value for name, value in case.items() if name != "kind"}
    return (run_speed if case["kind"] == "speed" else run_memory)(**given, device=device)


def run_in_child(case: dict[str, Any], device: str) -> dict[str, Any]:
    """One case in a fresh process; its last line of output is shown when it fails."""
    print(" ".join(str(value) for value in case.values()), "...", file=sys.stderr, flush=True)
    surroundings = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if case["kind"] == "memory":
        # Freed tensors go back to the system at once, so that resident memory is what lives.
        surroundings["MALLOC_MMAP_THRESHOLD_"] = str(64 * 1024)
    options = ["--case", json.dumps(case), "--device", device]
    return in_fresh_process(__file__, options, f"case {case}", surroundings)


def figures(memory: list[dict[str, Any]], speed: list[dict[str, Any]]) -> dict[str, float]:
    """The named figures, each of the worst host."""
    found = {
        "gradient_relative_error": max(row["gradient_relative_error"]["ours"] for row in speed),
        "time_ratio_vs_naive": max(row["time_ratio_ours"] for row in speed),
        "time_ratio_over_limit": max(row["time_ratio_ours"] / row["limit"] for row in speed),
        "cpu_time_ratio_vs_naive": max(row["cpu_time_ratio_ours"] for row in speed),
        "cpu_time_ratio_over_limit": max(row["cpu_time_ratio_ours"] / row["limit"] for row in speed),
        "calls_ratio_vs_naive": max(row["calls"]["ours"] / row["calls"]["naive"] for row in speed),
    }
    peaks = {(row["host"], row["way"], row["steps"]): row["extra_bytes"] for row in memory}
    for host in ("dit", "unet", "sd15"):
        if (host, "ours", 50) in peaks:
            found[f"memory_ratio_t50_t5_{host}"] = peaks[host, "ours", 50] / peaks[host, "ours", 5]
        if (host, "naive", 5) in peaks:
            found[f"memory_ratio_vs_naive_t5_{host}"] = peaks[host, "ours", 5] / peaks[host, "naive", 5]
    found["memory_ratio_t50_t5"] = max(v for name, v in found.items() if name.startswith("memory_ratio_t50_t5_"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small inputs, without the full-size SD 1.5: < 5 minutes")
    parser.add_argument("--out", type=Path, help="JSON to write; default: print it")
    parser.add_argument("--table", type=Path, help="Markdown page whose generated part is replaced by the result")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--case", help="only this case, as JSON, in this process")
    arguments = parser.parse_args()

    from genprune.bench.result import environment
    from genprune.files import whole_file
    from scripts.checkpointing.table import write_table

    if arguments.case:
        result = run_case(json.loads(arguments.case), arguments.device)
    else:
        rows = [(case["kind"], run_in_child(case, arguments.device)) for case in cases(arguments.quick)]
        memory, speed = ([row for kind, row in rows if kind == wanted] for wanted in ("memory", "speed"))
        result = {
            **environment(arguments.device),
            "kind": "genprune-bench-checkpointing",
            "quick": arguments.quick,
            "seeds": {"weights": 0, "noise": 0, "gates": "the step"},
            "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "figures": figures(memory, speed),
            "memory": memory,
            "speed": speed,
        }
    text = json.dumps(result, indent=2) + "\n"
    if arguments.out is None:
        print(text)
    else:
        with whole_file(arguments.out) as temporary:
            temporary.write_text(text)
    if arguments.table and not arguments.case:
        write_table(arguments.table, result)


if __name__ == "__main__":
    main()
