"""Rows of accuracy: a model with fewer tokens, judged by what was trained on the dense model's output.

A row holds no plain accuracy alone: also the paired difference to the dense model with its interval, how often both
answer alike, how near the features are, and what share of the multiply-accumulates the call really did.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

import genprune as gp
from genprune.files import whole_file
from genprune.metrics.bootstrap import paired_difference
from scripts.tokens.candidates import Row


class Exam(Protocol):
    """A model and labelled pictures to judge it on."""

    name: str
    model: nn.Module
    labels: Tensor
    dense: dict[str, Tensor]

    def sit(self) -> dict[str, Tensor]:
        """The model as it is now: `features` (n, width), `answers` (n,), and perhaps more answers by name."""
        ...


@torch.no_grad()
def counted_macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of the matrix products of one call as torch counts them, scoring of tokens included."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(example)
    return counter.get_total_flops() // 2


def judged(exam: Exam, example: Tensor, method: Any | None) -> dict[str, Any]:
    """One row, JSON-ready but for `right` (bool tensors by the name of the answers).

    Args:
        exam: what to judge on; its `dense` holds what the dense model gave.
        example: one picture, to count multiply-accumulates with.
        method: `gp.ZeroTPrune` or `gp.ToMe`; None: the dense model.
    """
    context = nullcontext() if method is None else gp.prune_tokens(exam.model, method)
    with context as handle:
        found = exam.sit()
        macs = counted_macs(exam.model, example)
    row: dict[str, Any] = {"macs": macs, "pictures": len(exam.labels), "right": {}}
    row["counts"] = {str(layer): count for layer, count in handle.counts.items()} if handle else {}
    dense = exam.dense or found
    row["cosine"] = functional.cosine_similarity(found["features"], dense["features"], dim=-1).mean().item()
    for name in found:
        if name.startswith("answers"):
            row["right"][name] = found[name] == exam.labels
            row[f"agreement {name}"] = (found[name] == dense[name]).double().mean().item()
    return row


def summarised(row: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """The row with accuracies and paired differences to the dense model in place of single answers."""
    result = {key: value for key, value in row.items() if key != "right"}
    result["macs_share"] = row["macs"] / dense["macs"]
    for name, right in row["right"].items():
        kind = name.removeprefix("answers").strip() or "accuracy"
        right, base = torch.tensor(right).double(), torch.tensor(dense["right"][name]).double()
        result[kind] = right.mean().item()
        result[f"{kind} difference"] = paired_difference(right, base).to_json()
        result[f"{kind} agreement"] = result.pop(f"agreement {name}")
    return result


class Rows:
    """Rows that are computed once: kept in a folder by what they are of, so that a run can go on.

    Args:
        folder: of this exam.
        log: prefix of progress lines.
    """

    def __init__(self, folder: Path, log: str):
        self.folder, self.log = folder, log

    def row(self, label: str, settings: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        file = self.folder / f"{key}.json"
        if not file.is_file():
            found = make()
            found["right"] = {name: right.int().tolist() for name, right in found["right"].items()}
            with whole_file(file) as temporary:
                temporary.write_text(json.dumps(found) + "\n")
            accuracy = {name: f"{sum(right) / len(right):.4f}" for name, right in found["right"].items()}
            print(f"{self.log}: {label}: {accuracy}, cosine {found['cosine']:.4f}", file=sys.stderr, flush=True)
        return json.loads(file.read_text())


def measured(
    exam: Exam,
    example: Tensor,
    wanted: Iterable[Row],
    folder: Path,
) -> list[dict[str, Any]]:
    """The rows that are asked for, dense first."""
    rows = Rows(folder / exam.name.replace(" ", "-"), exam.name)
    dense = rows.row("dense", "dense", lambda: judged(exam, example, None))
    found = [{"name": "dense", "group": "dense", "keep": 1.0, **summarised(dense, dense)}]
    for one in wanted:
        row = rows.row(one.label, one.key, functools.partial(judged, exam, example, one.method))
        found.append(
            {
                "name": one.candidate.name,
                "group": one.candidate.group,
                "keep": one.keep,
                "method": one.method.to_json(),
                **summarised(row, dense),
                "right": row["right"],
            }
        )
    return found


def paired_against(rows: list[dict[str, Any]], name: str, other: str, keep: float) -> dict[str, Any]:
    """Accuracy of one row minus another's at the same share, with its interval: `Interval` as JSON."""
    sides = [
        torch.tensor(next(r for r in rows if r["name"] == side and r["keep"] == keep)["right"]["answers"]).double()
        for side in (name, other)
    ]
    return paired_difference(*sides).to_json()
