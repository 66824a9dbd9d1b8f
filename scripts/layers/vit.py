"""Layers of a trained ViT classifier: accuracy one-shot and after a short recovery on labelled pictures."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import TensorDataset

import genprune as gp
from scripts.vit.data import FashionMNIST, load_fashion_mnist
from scripts.vit.training import accuracy

BUDGETS = (0.5, 0.75)
METHODS = {
    "laptop": gp.LaptopDiff(of="macs"),
    "laptop, js": gp.LaptopDiff(of="macs", distance="js"),
    "finercut": gp.FinerCut(keep=min(BUDGETS), of="macs", distance="js"),
    "operators": gp.LDPruner(of="macs", criterion="output_mse"),
    "random": None,
    "alternate layers": None,
}
SCORED = 256  # dev pictures that layers are judged on
TESTED = 5_000  # test pictures
BATCH = 64
SHARES = (0.001, 0.01, 0.05)  # of the pictures that the classifier saw; above 1 % at half the MACs alone


def vit_rows(folder: Path, data: Path, work: Path) -> dict[str, Any]:
    """Every method at both budgets.

    Args:
        folder: what `scripts/train_vit.py` wrote.
        data: folder of Fashion-MNIST's files.
        work: rows that are done.
    """
    splits = load_fashion_mnist(data)
    tested = splits.test_images[:TESTED], splits.test_labels[:TESTED]
    model = gp.load_model(folder / "model")
    trained = json.loads((folder / "result.json").read_text())
    seen = trained["settings"]["epochs"] * trained["data"]["train_images"]
    scores: dict[str, Any] = {}
    rows = {}
    for keep in BUDGETS:
        for method, settings in METHODS.items():
            file = work / f"{method.replace(', ', '-').replace(' ', '-')}@{keep:g}.json"
            if not file.is_file():
                plan = _plan(model, splits.dev_images[:SCORED], method, settings, keep, scores)
                row = _judged(model, plan, splits, tested, seen, SHARES if keep == min(BUDGETS) else SHARES[:2])
                row = {"method": method, "keep": keep, "costs": dict(plan.figures), **row}
                row["layers"] = plan.made_by["layers"]
                work.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(row) + "\n")
                print(f"vit: {file.stem}: {row['accuracy']}", file=sys.stderr, flush=True)
            rows[file.stem] = json.loads(file.read_text())
    return {
        "dense_accuracy": accuracy(model, *tested),
        "test_images": TESTED,
        "samples_seen": seen,
        "trained": {key: trained[key] for key in ("figures", "model", "settings", "data")},
        "rows": rows,
    }


def _judged(
    model: nn.Module,
    plan: gp.PruningPlan,
    splits: FashionMNIST,
    tested: tuple[Tensor, Tensor],
    seen: int,
    shares: tuple[float, ...],
) -> dict[str, Any]:
    """Accuracy one-shot and along a recovery with labels and the dense model's logits."""
    stops = {max(1, round(share * seen / BATCH)): share for share in shares}
    small = gp.cut(copy.deepcopy(model), plan)
    points = {"0": accuracy(small, *tested)}

    def validation(step: int, target: nn.Module) -> dict:
        if step in stops:
            points[str(stops[step])] = accuracy(target, *tested)
        return {}

    method = gp.NormalizedDistillation(
        steps=max(stops),
        batch_size=BATCH,
        learning_rate=5e-4,
        warmup_steps=min(10, max(stops) // 2),
        weight_decay=0.0,
        ema_decay=0.98,
        feature_reduction="mean",
        temperature=2.0,
    )
    pictures = TensorDataset(splits.train_images, splits.train_labels)
    gp.recover(small, model, method, data=pictures, validation=validation, validation_steps=1, progress=False)
    return {"accuracy": points, "additivity": plan.made_by.get("additivity")}


def _plan(model: nn.Module, pictures: Tensor, method: str, settings, keep: float, scores: dict) -> gp.PruningPlan:
    source = "laptop" if settings is None else method
    if source not in scores:
        scores[source] = gp.score(model, METHODS[source], data=list(pictures.split(128)), progress=False)
    found = scores[source]
    if settings is None:  # the same candidates and budget, with losses that are drawn, or say every other block
        draw = random.Random(0)
        losses = {}
        for name, candidate in sorted(found.candidates.items()):
            saved = candidate.saves["macs"]
            odd = int(name.split(".")[1].split(":")[0]) % 2
            even = (1 if odd else 10) if name.endswith(":block") else 1000
            losses[name] = saved * (draw.random() if method == "random" else even)
        found = dataclasses.replace(found, losses=losses, order=None, additivity=None)
    return found.plan(keep=keep)
