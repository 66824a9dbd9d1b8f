"""The curve of a recovery: one record a step, in memory and as JSON lines that are written as they come."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from genprune.errors import PlanMismatch
from genprune.files import whole_file

CURVE = "curve.jsonl"


class Curve:
    """Records of a run.

    Args:
        folder: gets `curve.jsonl`; None keeps them in memory alone.
        step: records of later steps, which a run that was interrupted left, are dropped.
        writes: whether this process writes.
    """

    def __init__(self, folder: str | os.PathLike | None, step: int, writes: bool = True) -> None:
        self.path = None if folder is None else Path(folder) / CURVE
        self.records = self._read(step)
        self.writes = writes and self.path is not None

    def begin(self) -> None:
        """Put the file into the state of `records`; afterwards every record is appended."""
        if self.writes:
            with whole_file(self.path) as written:
                written.write_text("".join(json.dumps(record) + "\n" for record in self.records))

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.writes:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def _read(self, step: int) -> list[dict[str, Any]]:
        if self.path is None or step == 0 or not self.path.is_file():
            return []
        records = []
        for line in self.path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                break  # a line that an interruption cut short, and what would follow it
            if record["step"] <= step:
                records.append(record)
        if [record["step"] for record in records] != list(range(1, step + 1)):
            raise PlanMismatch(
                f"'{self.path}' has {len(records)} of the {step} records up to the checkpoint; expected all. "
                "Start anew in another output_dir, or delete the file and the checkpoints."
            )
        return records
