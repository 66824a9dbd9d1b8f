"""One part of a benchmark in a fresh process, so that memory and time of one part are not those of another."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def in_fresh_process(script: str, options: Sequence[str], what: str, env: Mapping[str, str]) -> dict[str, Any]:
    """The JSON that `script OPTIONS --out FILE` writes.

    Args:
        script: path of the script, as `__file__` has it.
        options: its flags, but for `--out`.
        what: names the part in the message of a failure, such as `part 'unet'`.
        env: of the process.

    Raises:
        SystemExit: with the last line that the process wrote, where it failed or wrote no file.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "part.json"
        command = [sys.executable, script, *options, "--out", str(answer)]
        child = subprocess.run(command, env=env, capture_output=True, text=True)
        if child.returncode or not answer.is_file():
            last = (child.stderr.strip().splitlines() or ["no message"])[-1]
            raise SystemExit(f"{what} failed with exit code {child.returncode}: {last}")
        return json.loads(answer.read_text())
