"""Find, plan, cut, save and reload full-size hosts; Torch-Pruning beside them; MACs saved against time saved.

    python scripts/bench_chain.py --quick --out chain.json     # under 5 minutes on 2 CPU cores
    python scripts/bench_chain.py --out docs/results/chain.json --table docs/benchmarks.md

Weights are random, so nothing here speaks of quality. Every part runs in a process of its own, one after the other:
peak memory of one is not hidden by what another left behind.
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

QUICK_PARTS = ("sd15", "torch_pruning", "unet", "dit", "vit")
FULL_PARTS = ("sd15", "sdxl", "torch_pruning", "unet", "dit", "vit")
WIDTHS = (0.5, 0.6, 0.7, 0.8, 0.9)


def run_part(name: str, quick: bool) -> dict[str, Any]:
    """One part, in this process."""
    from scripts.chain.chain import run_chain
    from scripts.chain.speed import measure_speed
    from scripts.chain.torch_pruning_run import run_torch_pruning

    if name in ("sd15", "sdxl"):
        return run_chain(name)
    if name == "torch_pruning":
        return run_torch_pruning()
    return measure_speed(name, (0.5, 0.7) if quick else WIDTHS, quick)


def run_in_child(name: str, quick: bool) -> dict[str, Any]:
    """One part in a fresh process; its last line of output is shown when it fails."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    options = ["--part", name, *(["--quick"] if quick else [])]
    return in_fresh_process(__file__, options, f"part '{name}'", {**os.environ, "HF_HUB_OFFLINE": "1"})


def figures(parts: dict[str, Any]) -> dict[str, float]:
    """The named figures: memory and time of the cut, and the share of the MACs saving that shows as time."""
    chains = [parts[name] for name in ("sd15", "sdxl") if name in parts]
    found = {"extra_memory_ratio": max(max(chain["extra_memory_ratio"].values()) for chain in chains)}
    for chain in chains:
        found |= {f"extra_memory_ratio_{p}_{chain['host']}": r for p, r in chain["extra_memory_ratio"].items()}
        found |= {f"seconds_{p}_{chain['host']}": phase["seconds"] for p, phase in chain["phases"].items()}
    rival = parts.get("torch_pruning", {})
    if "phases" in rival:
        ours = parts["sd15"]["phases"]
        for unit, prefix in (("seconds", ""), ("cpu_seconds", "cpu_")):
            apply = ours["find"][unit] + ours["cut"][unit]
            trace, step = (phase[unit] for phase in rival["phases"].values())
            ratios = {
                # a plan applied, against Torch-Pruning's one way to cut: trace, then a step that scores as well
                "cut_time_ratio_vs_torch_pruning": apply / (trace + step),
                # the same decision already made on both sides: find sites or trace, then change the layers
                "known_cut_time_ratio_vs_torch_pruning": apply / (trace + rival["cut_alone"][unit]),
                # from a loaded dense model to a cut one, scores included on both sides
                "end_to_end_time_ratio_vs_torch_pruning": (apply + ours["plan"][unit]) / (trace + step),
            }
            found |= {f"{prefix}{name}": ratio for name, ratio in ratios.items()}
    for name in ("unet", "dit", "vit"):
        if name in parts:
            found[f"macs_saving_seen_{name}"] = parts[name]["macs_saving_seen"]
            found[f"macs_saving_seen_in_cpu_time_{name}"] = parts[name]["macs_saving_seen_in_cpu_time"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without SDXL, small inputs, two widths: < 5 minutes")
    parser.add_argument("--out", type=Path, help="JSON to write; default: print it")
    parser.add_argument("--table", type=Path, help="Markdown page to write from the result")
    parser.add_argument("--part", choices=FULL_PARTS, help="only this part, in this process")
    arguments = parser.parse_args()

    from genprune.bench.result import environment
    from genprune.files import whole_file
    from scripts.chain.table import write_table

    if arguments.part:
        result = run_part(arguments.part, arguments.quick)
    else:
        parts = {
            name: run_in_child(name, arguments.quick) for name in (QUICK_PARTS if arguments.quick else FULL_PARTS)
        }
        result = {
            **environment(),
            "kind": "genprune-bench-chain",
            "quick": arguments.quick,
            "seeds": {"weights": 0, "units": 0},
            "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "figures": figures(parts),
            "parts": parts,
        }
    text = json.dumps(result, indent=2) + "\n"
    if arguments.out is None:
        print(text)
    else:
        with whole_file(arguments.out) as temporary:
            temporary.write_text(text)
    if arguments.table and not arguments.part:
        write_table(arguments.table, result)


if __name__ == "__main__":
    main()
