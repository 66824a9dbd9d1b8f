"""EcoDiff against random, magnitude, Taylor, OBS, its own per-step ablation, shuffled units and fewer steps.

    python scripts/bench_ecodiff.py --quick --out ecodiff.json    # under 5 minutes on 2 CPU cores: one budget
    python scripts/bench_ecodiff.py --work runs/ecodiff --out docs/results/ecodiff.json --docs docs

On the embedded miniatures: the same test captions, noise and sampler for every candidate, no retraining. Methods are
calibrated and masks are learned on the dev split. What has been computed is kept in `--work` and not computed again,
so that bases can run in processes of their own (`--base unet`) before a last call puts all together.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetensors.torch import load_file, save_file  # noqa: E402

from scripts.ecodiff.bases import Base, bases, latents_of, pictures_of  # noqa: E402
from scripts.ecodiff.candidates import Candidate, candidates  # noqa: E402
from scripts.ecodiff.figures import TEST_SEED, Dense, Judge  # noqa: E402
from scripts.ecodiff.page import main_figures, write_page  # noqa: E402
from scripts.ecodiff.plans import Planner, cut_copy, shuffled  # noqa: E402


def judge_base(base: Base, judge: Judge, arguments: argparse.Namespace) -> dict:
    """Rows of one base: the dense pipeline, and every candidate at every budget."""
    pipe = base.load()
    pipe.set_progress_bar_config(disable=True)
    planner = Planner(base, pipe, arguments.work, arguments.train_steps, arguments.prompts)
    folder = arguments.work / base.name / f"drawn-{judge.count}"
    latents, pictures = drawn(folder / "dense.safetensors", pipe, base, judge)
    dense = Dense(latents, pictures, judge.grade(pictures, judge.scenes)["grade(all)"].double())
    rows = {"dense": {"costs": {}, **judge.figures(pictures, latents, None)}}
    for candidate in candidates(base, arguments.quick):
        if candidate.method in arguments.without or (arguments.budgets and candidate.budget not in arguments.budgets):
            continue
        file = folder / f"{candidate.slug}.json"
        if not file.is_file():
            began = time.perf_counter()
            row = judged(candidate, base, pipe, planner, judge, dense, folder)
            row["seconds"] = round(time.perf_counter() - began, 1)
            file.write_text(json.dumps(row) + "\n")
            print(
                f"{base.name}: {candidate.slug}: PSNR {row['psnr']['estimate']:.2f}, "
                f"right {row['all_right']['estimate']:.3f}",
                file=sys.stderr,
                flush=True,
            )
        rows[candidate.slug] = {**candidate.to_json(), **json.loads(file.read_text())}
    return {"rows": rows, "curves": planner.curves(), "scoring": planner.notes()}


def drawn(file: Path, pipe, base: Base, judge: Judge, steps: int | None = None):
    """Latents and pictures of the test captions, from disk where they are."""
    if not file.is_file():
        latents = latents_of(pipe, base, judge.prompts, TEST_SEED, steps)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"latents": latents.contiguous(), "pictures": pictures_of(pipe, latents)}, file)
    found = load_file(file)
    return found["latents"], found["pictures"]


def judged(candidate: Candidate, base: Base, pipe, planner: Planner, judge: Judge, dense: Dense, folder: Path) -> dict:
    """Figures of one candidate: planned, compensated where asked, really cut, drawn."""
    file = folder / f"{candidate.slug}.safetensors"
    if candidate.method is None:  # the dense model with fewer steps
        steps = max(1, round(base.steps * candidate.keep))
        latents, pictures = drawn(file, pipe, base, judge, steps)
        return {"costs": {"steps": steps}, **judge.figures(pictures, latents, dense)}
    plan = planner.plan(candidate.method, candidate.keep, candidate.of)
    if candidate.shuffle is not None:
        plan = shuffled(plan, candidate.shuffle)
    small = cut_copy(base, pipe, plan, candidate.compensation)
    latents, pictures = drawn(file, small, base, judge)
    return {"costs": dict(plan.figures), **judge.figures(pictures, latents, dense)}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one base and budget, short learning: < 5 minutes")
    parser.add_argument("--base", choices=tuple(bases()), action="append", help="only these bases")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/ecodiff"), help="scores, checkpoints and drawn pictures"
    )
    parser.add_argument("--without", nargs="+", default=(), help="leave these methods out, for another process to do")
    parser.add_argument("--budgets", nargs="+", metavar="KEEP-OF", help="only these, such as 0.7-macs")
    parser.add_argument("--out", type=Path, help="JSON to write; default: print it")
    parser.add_argument("--docs", type=Path, help="docs folder whose page and picture grids are written")
    parser.add_argument("--train_steps", type=int, default=150, help="optimiser steps of the masks")
    parser.add_argument("--prompts", type=int, default=256, help="dev captions that masks are learned on")
    parser.add_argument("--num_prompts", type=int, default=96, help="test captions that are drawn and graded")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.base = arguments.base or ["unet"]
        arguments.train_steps, arguments.prompts, arguments.num_prompts = 10, 40, 16
        arguments.work = arguments.work / "quick"
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    from genprune.bench.result import environment
    from genprune.files import whole_file

    judge = Judge(arguments.num_prompts)
    chosen = [base for name, base in bases().items() if not arguments.base or name in arguments.base]
    parts = {base.name: judge_base(base, judge, arguments) for base in chosen}
    result = {
        **environment(),
        "kind": "genprune-bench-ecodiff",
        "quick": arguments.quick,
        "seeds": {"test_scenes": TEST_SEED, "noise": f"{TEST_SEED} + index", "dev_scenes": 1, "masks": 0},
        "data": {
            "test_captions": judge.count,
            "dev_captions": arguments.prompts,
            "test_captions_sha256": hashlib.sha256(json.dumps(judge.prompts).encode()).hexdigest(),
        },
        "train_steps": arguments.train_steps,
        "figures": main_figures(parts),
        "bases": parts,
    }
    text = json.dumps(result, indent=1) + "\n"
    if arguments.out is None:
        print(text)
    else:
        with whole_file(arguments.out) as temporary:
            temporary.write_text(text)
    if arguments.docs:
        write_page(arguments.docs, result, arguments.work, judge.prompts)


if __name__ == "__main__":
    main()
