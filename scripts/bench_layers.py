"""Layer and operator pruning: LAPTOP-Diff, LD-Pruner, FinerCut, TinyFusion, alternate layers, random; with recovery.

    python scripts/bench_layers.py --quick --out layers.json      # under 5 minutes on 2 CPU cores
    python scripts/bench_layers.py --work runs/layers --out docs/results/layers.json --docs docs

On the embedded miniatures, the same test captions, noise and sampler for every candidate: one-shot at 75 % and 50 % of
MACs, and along the recovery curve at 0.1 %, 1 % and (for some) 5 % of the samples that the base was trained on. What
has been computed is kept in `--work` and not computed again, so that bases can run in processes of their own
(`--base unet`) before a last call puts all together. `--latency` times the plans on an idle machine.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from scripts.ecodiff.bases import Base, bases, latents_of, pictures_of  # noqa: E402
from scripts.ecodiff.figures import TEST_SEED, Dense, Judge  # noqa: E402
from scripts.layers.page import main_figures, write_page  # noqa: E402
from scripts.layers.plans import BUDGETS, METHODS, Planner  # noqa: E402
from scripts.layers.recovering import BATCH, DATA_SEED, SEEN, Recoverer  # noqa: E402
from scripts.layers.speed import latencies  # noqa: E402
from scripts.layers.vit import vit_rows  # noqa: E402

LONG = ("laptop", "operators", "alternate layers", "random", "from scratch")  # recovered up to 5 % at half the MACs


def judge_base(base: Base, judge: Judge, arguments: argparse.Namespace) -> dict:
    """Every candidate of one base: plan, one-shot figures, figures along the recovery."""
    pipe = base.load()
    pipe.set_progress_bar_config(disable=True)
    work = arguments.work / base.name
    planner = Planner(base, pipe, work, arguments.captions, arguments.trajectories, arguments.train_steps)
    recoverer = Recoverer(base, pipe, work, arguments.samples, arguments.threads)
    dense = _dense(base, pipe, judge)

    def figures(target) -> dict:
        latents = latents_of(target, base, judge.prompts, TEST_SEED)
        return judge.figures(pictures_of(target, latents), latents, dense)

    rows: dict[str, dict] = {}
    for method, seed, keep in _candidates(arguments):
        slug = f"{method.replace(' ', '-')}-{seed}@{keep:g}"
        file = work / "rows" / f"{slug}.json"
        if not file.is_file():
            plan = planner.plan("laptop" if method in ("from scratch", "laptop, mse") else method, keep, seed)
            small = cut_copy(pipe, plan)
            if method == "from scratch":
                initialise_(small)
            row = {"method": method, "seed": seed, "keep": keep, "costs": dict(plan.figures)}
            row["points"] = {"0": figures(small)}
            is_long = keep == min(BUDGETS) and method in LONG and not seed
            most = arguments.most if is_long else min(arguments.most, 0.01)
            if most and not (seed and method == "random"):
                changes = {"normalizer": "mse"} if method == "laptop, mse" else {}
                if method == "from scratch":
                    changes = {"feature_weight": 0.0, "output_weight": 0.0, "learning_rate": 1e-3}
                points, curve = recoverer.run(small, slug, most, figures, **changes)
                row["points"] |= {str(share): point for share, point in points.items()}
                row["terms"] = spread_of_terms(curve)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(row) + "\n")
            last = list(row["points"].values())
            print(f"{base.name}: {slug}: right", *(f"{p['all_right']['estimate']:.3f}" for p in last), file=sys.stderr)
        rows[slug] = json.loads(file.read_text())
    result = {"rows": rows, "plans": planner.reports(), "dense": judge.figures(dense.pictures, dense.latents, None)}
    if arguments.latency:
        own = {slug: row for slug, row in rows.items() if row["method"] in METHODS}
        plans = {slug: planner.plan(row["method"], row["keep"], row["seed"]) for slug, row in own.items()}
        result["latency"] = latencies(pipe, plans)
    if arguments.docs:
        draw_grid(base, pipe, planner, judge, work / "grid.png")
    return result


def draw_grid(base: Base, pipe, planner: Planner, judge: Judge, file: Path, columns: int = 8) -> None:
    """Pictures of the first test captions: the dense pipeline's, and every method's at half the MACs."""
    from scripts.miniature.pictures import contact_sheet

    if file.is_file():
        return
    prompts, drawn, captions = judge.prompts[:columns], [], []
    for method in ("dense", *METHODS):
        small = pipe if method == "dense" else cut_copy(pipe, planner.plan(method, min(BUDGETS)))
        pictures = pictures_of(small, latents_of(small, base, prompts, TEST_SEED))
        drawn.append(pictures.permute(0, 2, 3, 1))
        captions += [f"{method}: {prompt}" for prompt in prompts]
    file.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(torch.cat(drawn).numpy(), file, columns=columns, zoom=2, captions=captions)


def _candidates(arguments: argparse.Namespace):
    """(method, seed, keep), the main budget's first."""
    for keep in sorted(BUDGETS) if not arguments.quick else (min(BUDGETS),):
        for method in METHODS if not arguments.quick else ("laptop", "random"):
            yield method, 0, keep
        if arguments.quick:
            continue
        if keep == min(BUDGETS):
            yield "laptop, mse", 0, keep
            yield "from scratch", 0, keep
        for seed in (1, 2):
            yield "random", seed, keep


def _dense(base: Base, pipe, judge: Judge) -> Dense:
    latents = latents_of(pipe, base, judge.prompts, TEST_SEED)
    pictures = pictures_of(pipe, latents)
    return Dense(latents, pictures, judge.grade(pictures, judge.scenes)["grade(all)"].double())


def cut_copy(pipe, plan):
    """The pipeline with a cut copy of its denoiser; the rest is shared."""
    import genprune as gp
    from genprune.families import denoiser, denoiser_slot

    small = copy.copy(pipe)
    small.__dict__[denoiser_slot(pipe)] = gp.cut(copy.deepcopy(denoiser(pipe)), plan)
    return small


@torch.no_grad()
def initialise_(pipe) -> None:
    """Fresh weights for every layer of a cut denoiser: the same shape, trained from scratch."""
    from genprune.families import denoiser

    torch.manual_seed(0)
    for module in denoiser(pipe).modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def spread_of_terms(curve: list[dict]) -> dict[str, float]:
    """Largest over smallest mean weighted feature term over the run, and the share of all features in the loss."""
    means: dict[str, float] = {}
    for row in curve:
        for name, term in row["terms"].items():
            means[name] = means.get(name, 0.0) + term["weighted"] / len(curve)
    features = {name: value for name, value in means.items() if name not in ("task", "output") and value > 0}
    if not features:
        return {}
    return {
        "spread": max(features.values()) / min(features.values()),
        "features_share": sum(features.values()) / sum(means.values()),
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one base, two methods, a short recovery: < 5 minutes")
    parser.add_argument("--base", choices=("unet", "mmdit"), action="append", help="only these bases")
    parser.add_argument("--work", type=Path, default=Path("runs/layers"), help="plans, rows, recovery")
    parser.add_argument("--out", type=Path, help="JSON to write; default: print it")
    parser.add_argument("--docs", type=Path, help="docs folder whose page and plots are written")
    parser.add_argument("--vit", type=Path, help="folder of a classifier that train_vit.py wrote; adds its rows")
    parser.add_argument("--vit_data", type=Path, help="folder of the pictures that it was trained on")
    parser.add_argument("--latency", action="store_true", help="also time every plan against the dense model")
    parser.add_argument("--captions", type=int, default=24, help="dev captions that layers are judged on")
    parser.add_argument("--trajectories", type=int, default=32, help="of LD-Pruner's latent statistics")
    parser.add_argument("--train_steps", type=int, default=150, help="optimiser steps of TinyFusion's gates")
    parser.add_argument("--num_prompts", type=int, default=64, help="test captions that are drawn and graded")
    parser.add_argument("--samples", type=int, default=4096, help="train scenes that recovery goes over")
    parser.add_argument("--most", type=float, default=0.05, help="largest share of the base's samples to recover on")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.base = arguments.base or ["unet"]
        arguments.captions, arguments.num_prompts, arguments.samples, arguments.most = 8, 16, 256, 0.001
        arguments.work = arguments.work / "quick"
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    from genprune.bench.result import environment
    from genprune.files import whole_file

    judge = Judge(arguments.num_prompts)
    chosen = [base for name, base in bases().items() if name in (arguments.base or ("unet", "mmdit"))]
    parts = {base.name: judge_base(base, judge, arguments) for base in chosen}
    result = {
        **environment(),
        "kind": "genprune-bench-layers",
        "quick": arguments.quick,
        "seeds": {"test_scenes": TEST_SEED, "noise": f"{TEST_SEED} + index", "recovery": 0, "data": DATA_SEED},
        "data": {
            "test_captions": judge.count,
            "test_captions_sha256": hashlib.sha256(json.dumps(judge.prompts).encode()).hexdigest(),
            "recovery_scenes": arguments.samples,
            "recovery_batch": BATCH,
            "base_samples": SEEN,
        },
        "settings": {
            name: getattr(arguments, name) for name in ("captions", "trajectories", "train_steps", "samples", "most")
        },
        "figures": main_figures(parts),
        "bases": parts,
    }
    if arguments.vit:
        result["vit"] = vit_rows(arguments.vit, arguments.vit_data, arguments.work / "vit")
    text = json.dumps(result, indent=1) + "\n"
    if arguments.out is None:
        print(text)
    else:
        with whole_file(arguments.out) as temporary:
            temporary.write_text(text)
    if arguments.docs:
        write_page(arguments.docs, result, arguments.work)


if __name__ == "__main__":
    main()
