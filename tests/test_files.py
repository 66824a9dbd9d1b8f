"""Files and folders get on disk whole, or not at all."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from genprune.files import whole_file, whole_folder


def folder_with(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file.txt").write_text(text)
    return path


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_a_failure_leaves_what_was_there(tmp_path: Path, whole):
    path = tmp_path / "x"
    path.write_text("old") if whole is whole_file else folder_with(path, "old")
    with pytest.raises(OSError, match="disk"), whole(path) as temporary:
        target = temporary if whole is whole_file else temporary / "file.txt"
        target.write_text("new")
        raise OSError("no space left on the disk")
    assert (path if whole is whole_file else path / "file.txt").read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_folder_comes_back_where_the_second_rename_fails(tmp_path: Path, monkeypatch, error):
    path, renames, rename = folder_with(tmp_path / "x", "old"), [], os.replace

    def failing(source, destination):
        renames.append(destination)
        if len(renames) == 2:
            raise error
        rename(source, destination)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(error), whole_folder(path) as temporary:
        (temporary / "file.txt").write_text("new")
    assert (path / "file.txt").read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["x"]


def test_ctrl_c_between_the_renames_waits(tmp_path: Path, monkeypatch):
    path, rename = folder_with(tmp_path / "x", "old"), os.replace

    def interrupted(source, destination):
        rename(source, destination)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), whole_folder(path) as temporary:
        (temporary / "file.txt").write_text("new")
    assert (path / "file.txt").read_text() == "new"
    assert [found.name for found in tmp_path.iterdir()] == ["x"]


def test_others_may_read_what_was_written(tmp_path: Path):
    with whole_file(tmp_path / "file") as temporary:
        temporary.write_text("text")
    with whole_folder(tmp_path / "folder"):
        pass
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755
