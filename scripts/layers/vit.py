"""Layers of a trained ViT classifier: accuracy one-shot and after a short recovery on labelled pictures."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import genprune as gp
from scripts.vit.data import load_fashion_mnist

BUDGETS = (0.75, 0.5)
METHODS = {
    "laptop": gp.LaptopDiff(of="macs"),
    "laptop, js": gp.LaptopDiff(of="macs", distance="js"),
    "finercut": gp.FinerCut(keep=min(BUDGETS), of="macs", distance="js"),
    "operators": gp.LDPruner(of="macs", criterion="output_mse"),
    "random": None,
    "alternate layers": None,
}
SCORED = 512  # dev pictures that layers are judged on
BATCH = 64
SHARES = (0.001, 0.01, 0.05)


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of pictures whose highest logit is right."""
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500)))
    return right / len(labels)


def vit_rows(folder: Path, data: Path, work: Path) -> dict[str, Any]:
    """Every method at both budgets.

    Args:
        folder: what `scripts/train_vit.py` wrote: a model and the JSON beside it.
        data: folder of Fashion-MNIST's files.
        work: rows that are done.
    """
    splits = load_fashion_mnist(data)
    model = gp.load_model(_model_folder(folder)).eval()
    dense = accuracy(model, splits.test_images, splits.test_labels)
    seen = _seen(folder, len(splits.train_labels))
    stops = {max(1, round(share * seen / BATCH)): share for share in SHARES}
    scores: dict[str, Any] = {}
    rows = {}
    for method, settings in METHODS.items():
        for keep in BUDGETS:
            file = work / f"{method.replace(', ', '-').replace(' ', '-')}@{keep:g}.json"
            if not file.is_file():
                plan = _plan(model, splits.dev_images[:SCORED], method, settings, keep, scores)
                small = gp.cut(copy.deepcopy(model), plan)
                points = {"0": accuracy(small, splits.test_images, splits.test_labels)}

                def validation(step: int, target: nn.Module, points: dict = points) -> dict:
                    if step in stops:
                        points[str(stops[step])] = accuracy(target, splits.test_images, splits.test_labels)
                    return {}

                recovery = gp.NormalizedDistillation(
                    steps=max(stops), batch_size=BATCH, learning_rate=5e-4, warmup_steps=10, ema_decay=0.98,
                    weight_decay=0.0, feature_reduction="mean", temperature=2.0,
                )  # fmt: skip
                pictures = torch.utils.data.TensorDataset(splits.train_images, splits.train_labels)
                gp.recover(
                    small, model, recovery, data=pictures, validation=validation, validation_steps=1, progress=False
                )
                row = {
                    "method": method,
                    "keep": keep,
                    "costs": dict(plan.figures),
                    "layers": plan.made_by["layers"],
                    "additivity": plan.made_by.get("additivity"),
                    "accuracy": points,
                }
                work.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(row) + "\n")
            rows[file.stem] = json.loads(file.read_text())
    return {"dense_accuracy": dense, "samples_seen": seen, "rows": rows}


def _model_folder(folder: Path) -> Path:
    return folder if (folder / "config.json").is_file() else next(p.parent for p in folder.rglob("config.json"))


def _seen(folder: Path, pictures: int) -> int:
    """Pictures that the classifier was trained on, repetitions counted."""
    for file in sorted(folder.rglob("*.json")):
        found = json.loads(file.read_text())
        if isinstance(found, dict) and "epochs" in found.get("settings", found):
            return int(found.get("settings", found)["epochs"]) * pictures
    return pictures


def _plan(model: nn.Module, pictures: Tensor, method: str, settings, keep: float, scores: dict) -> gp.PruningPlan:
    data = list(pictures.split(128))
    source = method if settings is not None else "laptop"
    if source not in scores:
        scores[source] = gp.score(model, METHODS[source], data=data, progress=False)
    found = scores[source]
    if settings is None:
        draw = random.Random(0)
        losses = {}
        for name, candidate in sorted(found.candidates.items()):
            number = int(name.split(".")[1].split(":")[0])
            drawn = draw.random() * candidate.saves["macs"]
            even = candidate.saves["macs"] * ((1 if number % 2 else 10) if name.endswith(":block") else 1000)
            losses[name] = drawn if method == "random" else even
        found = dataclasses.replace(found, losses=losses, order=None, additivity=None)
    return found.plan(keep=keep)
