"""How a file or a folder gets on disk whole: written under a temporary name beside its place, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from genprune.errors import PlanMismatch
from genprune.interrupts import interrupt_deferred


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path; on success it becomes `path`, on any failure `path` is as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    try:
        yield Path(temporary)
        os.chmod(temporary, 0o644)  # a temporary file is its owner's alone
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder; on success it becomes `path` (replacing it), on any failure `path` is as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        with interrupt_deferred():  # between the two renames there is nothing at `path`
            _swap(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, path: Path) -> None:
    """Put `temporary` at `path`; what was there goes last."""
    if not path.exists():
        os.replace(temporary, path)
        return
    retired = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.replace(path, retired)
    try:
        os.replace(temporary, path)
    except BaseException:
        os.replace(retired, path)
        raise
    if retired.is_dir():
        shutil.rmtree(retired, ignore_errors=True)
    else:
        retired.unlink()


def check_replaceable(folder: str | os.PathLike, marker: str, what: str = "a saved model") -> None:
    """Refuse to replace a folder as a whole unless it is empty or holds `marker`: no one's other files go with it.

    Raises:
        PlanMismatch: `folder` is a file, or a folder of something else than `what`.
    """
    folder = Path(folder)
    if folder.is_dir() and (not any(folder.iterdir()) or (folder / marker).is_file()):
        return
    if folder.exists():
        found = "a folder with other files" if folder.is_dir() else "a file"
        raise PlanMismatch(f"'{folder}' is {found}; expected a new folder or one of {what}. Pass another path.")
