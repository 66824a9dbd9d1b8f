"""Prompt routing: what serving a mixed batch costs in time and memory, and what routed experts draw.

    python scripts/bench_routing.py --quick --out routing.json        # serving and memory, under 5 minutes on 2 cores
    python scripts/bench_routing.py --encoder MINILM --out docs/results/routing.json --docs docs

Parts can run one after another, on a machine that is idle for those that time: `--out` keeps what it has of the parts
that were not asked for. `serving`: a mixed batch of 64 prompts through routed pipelines against its groups run
separately on really cut pipelines; switches of expert; routing. `memory`: peak of a fresh process that serves eight
experts over one that serves the dense model. `quality`: routed experts against static plans on the miniatures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

PARTS = ("serving", "memory", "quality")
PLACES = ("encoder", "out", "docs")
STAGES = ("train", "finetune", "draw")
PAGE = "routing-compared.md"


def run_part(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What one part measures."""
    if name == "serving":
        from scripts.routing.serving import serving

        return serving(arguments.quick, arguments.encoder, arguments.cases)
    if name == "memory":
        from scripts.routing.memory import memory

        return memory(arguments.quick)
    from scripts.routing.quality import quality

    return quality(arguments)


def figures_of(parts: dict[str, Any]) -> dict[str, float]:
    """The figures of all parts that are there."""
    from scripts.routing.memory import memory_figures
    from scripts.routing.page import quality_figures
    from scripts.routing.serving import serving_figures

    makers = {"serving": serving_figures, "memory": memory_figures, "quality": quality_figures}
    figures = {}
    for name, part in parts.items():
        figures |= makers[name](part["found"])
    return figures


def joined(result: dict[str, Any] | None, parts: dict[str, Any]) -> dict[str, Any]:
    """An earlier result with newer parts in place of its own, and the figures of all of them."""
    kept = (result or {}).get("parts", {})
    found = {name: parts.get(name, kept.get(name)) for name in PARTS if name in kept or name in parts}
    return {"kind": "genprune-bench-routing", "format_version": 1, "figures": figures_of(found), "parts": found}


def provenance(arguments: argparse.Namespace) -> dict[str, Any]:
    """Command (places on this machine left out), commit, versions, hardware, seeds."""
    from genprune.bench.result import environment

    command = ["python scripts/bench_routing.py", *(["--quick"] if arguments.quick else [])]
    command.append("--parts " + " ".join(arguments.parts))
    command += [f"--{place} {place.upper()}" for place in PLACES if getattr(arguments, place) is not None]
    found = environment()
    found["command"] = " ".join(command)
    return {"quick": arguments.quick, **found, "seeds": {"weights": 0, "prompts": 0, "pictures": 0, "bootstrap": 0}}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=["serving", "memory"], help="what to measure; default: both"
    )
    parser.add_argument("--quick", action="store_true", help="16 prompts, few steps and rounds")
    parser.add_argument("--encoder", help="folder of a sentence encoder; default: the pipeline's own text encoder")
    parser.add_argument("--cases", nargs="+", help="serving: only these pipelines; others stay as --out has them")
    quality = parser.add_argument_group("quality").add_argument
    quality("--work", type=Path, default=Path("runs/routing"), help="routers, experts and drawn pictures")
    quality("--ecodiff_work", type=Path, default=Path("runs/ecodiff"), help="work folder of scripts/bench_ecodiff.py")
    quality("--layers_work", type=Path, default=Path("runs/layers"), help="work folder of scripts/bench_layers.py")
    quality("--base", choices=("unet", "mmdit"), action="append", help="only these bases; another call does the rest")
    quality("--budgets", type=float, nargs="+", help="only these shares of the MACs")
    quality("--only", nargs="+", help="only these candidates, such as 8-experts")
    quality("--train_steps", type=int, default=150, help="of each router")
    quality("--samples", type=int, default=2048, help="train scenes that routers and experts are trained on")
    quality("--num_prompts", type=int, default=96, help="test captions that are drawn and graded")
    quality("--stages", nargs="+", choices=STAGES, default=STAGES, help="what is done before comes from --work")
    parser.add_argument("--out", type=Path, help="JSON to write or to add to; default: print it")
    parser.add_argument("--docs", type=Path, help="docs folder whose page is written")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own number")
    arguments = parser.parse_args(argv)
    if "quality" in arguments.parts and not arguments.encoder:
        parser.error("quality needs --encoder FOLDER, a sentence encoder's folder")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    from genprune.files import whole_file

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    result = None
    for name in arguments.parts:
        parts = {name: {**provenance(arguments), "found": run_part(name, arguments)}}
        if name == "quality":
            from scripts.routing.quality import data_of

            parts[name]["data"] = data_of(arguments)
        # read again: another process may have added its part meanwhile
        earlier = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.is_file() else result
        if name == "serving" and arguments.cases and "serving" in (earlier or {}).get("parts", {}):
            parts[name]["found"] = earlier["parts"][name]["found"] | parts[name]["found"]
        result = joined(earlier, parts)
        if arguments.out is not None:
            with whole_file(arguments.out) as temporary:
                temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if arguments.out is None:
        print(json.dumps(result, indent=1, ensure_ascii=False))
    if arguments.docs is not None:
        from scripts.routing.page import write_quality, write_serving
        from scripts.routing.serving import serving_lines

        if {"serving", "memory"} & result["parts"].keys():
            write_serving(arguments.docs / PAGE, serving_lines(result["parts"]))
        if "quality" in result["parts"]:
            write_quality(arguments.docs / PAGE, result["parts"]["quality"]["found"])


if __name__ == "__main__":
    main()
