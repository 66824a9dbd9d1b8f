"""Score removable layers with prefix reuse and by the naive loop, side by side, and compare times and scores.

    python scripts/bench_layer_scoring.py --quick --out scoring.json     # under 5 minutes on 2 CPU cores
    python scripts/bench_layer_scoring.py --out docs/results/layer_scoring.json

The naive loop runs the whole model once for each removed layer. Prefix reuse runs only what lies behind that layer.
`scoring_cost_over_limit_HOST` is the time of reuse over that of the naive loop, divided by the same ratio of counted
MACs: 1 means that every multiply-accumulate that need not run saves its share of time. It is below 1 where what is
spared takes more time for a multiply-accumulate than the rest, and above where it takes less;
`scoring_cpu_cost_over_measured_behind_HOST` sets the same ratio against the measured CPU time of what lies behind each
layer instead. Weights are random, so nothing here speaks of quality. Every host runs in a process of its own.
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

PARTS = ("unet", "dit", "flux")
AIM = 1.05  # of the cost over the limit
SEED = 0


def run_in_child(name: str, quick: bool, rounds: int) -> dict[str, Any]:
    """One host in a fresh process; its last line of output is shown when it fails."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    options = ["--part", name, "--rounds", str(rounds), *(["--quick"] if quick else [])]
    return in_fresh_process(__file__, options, f"part '{name}'", {**os.environ, "HF_HUB_OFFLINE": "1"})


def figures(parts: dict[str, Any]) -> dict[str, float]:
    """The named figures: cost over the limit, plain ratios of each host, and the worst error of a score."""
    found = {"score_relative_error": max(part["score_relative_error"] for part in parts.values())}
    for name, part in parts.items():
        found |= {
            f"scoring_cost_over_limit_{name}": part["cost_over_limit"],
            f"scoring_cpu_cost_over_limit_{name}": part["cpu_cost_over_limit"],
            f"scoring_time_ratio_{name}": part["time_ratio"],
            f"scoring_cpu_time_ratio_{name}": part["cpu_time_ratio"],
            f"scoring_counted_ratio_{name}": part["counted_ratio"],
            f"scoring_cpu_cost_over_measured_behind_{name}": part["cpu_cost_over_measured_behind"],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small inputs, some of the layers: < 5 minutes")
    parser.add_argument("--rounds", type=int, help="how often every layer is scored both ways; default 2, quick 1")
    parser.add_argument("--out", type=Path, help="JSON to write; default: print it")
    parser.add_argument("--part", choices=PARTS, help="only this host, in this process")
    arguments = parser.parse_args()
    rounds = (1 if arguments.quick else 2) if arguments.rounds is None else arguments.rounds
    if rounds < 1:
        parser.error(f"--rounds {rounds}: nothing would be timed; expected 1 or more. Type e.g. --rounds 2.")

    from genprune.bench.result import environment
    from genprune.files import whole_file
    from scripts.layer_scoring.measure import measure

    if arguments.part:
        result = measure(arguments.part, arguments.quick, rounds, SEED)
    else:
        parts = {name: run_in_child(name, arguments.quick, rounds) for name in PARTS}
        result = {
            **environment(),
            "kind": "genprune-bench-layer-scoring",
            "quick": arguments.quick,
            "aim": AIM,
            "seeds": {"weights": SEED, "inputs": SEED, "order": SEED},
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


if __name__ == "__main__":
    main()
