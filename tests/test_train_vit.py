"""`scripts/train_vit.py`: IDX files become splits, augmentation keeps the picture, a run resumes and can be pruned."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch

import genprune as gp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import train_vit  # noqa: E402
from scripts.vit.data import FILES, data_hash, load_fashion_mnist, normalised  # noqa: E402
from scripts.vit.training import Training, accuracy, augmented, rate_factor, train  # noqa: E402


def write_idx(folder: Path, name: str, values: torch.Tensor) -> None:
    header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}i", *values.shape)
    (folder / FILES[name]).write_bytes(gzip.compress(header + values.to(torch.uint8).numpy().tobytes()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures whose class is the row that is bright."""
    path = tmp_path_factory.mktemp("fashion")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 5200), ("test", 200)):
        labels = torch.randint(0, 10, (count,), generator=generator)
        images = torch.randint(0, 60, (count, 28, 28), generator=generator)
        images[torch.arange(count), labels * 2 + 4] = 250
        write_idx(path, f"{split}_images", images)
        write_idx(path, f"{split}_labels", labels)
    return path


def test_idx_files_become_disjoint_splits(folder):
    data = load_fashion_mnist(folder)
    assert [tuple(part.shape) for part in data[::2]] == [(200, 1, 28, 28), (5000, 1, 28, 28), (200, 1, 28, 28)]
    assert [part.dtype for part in data] == [torch.float32, torch.int64] * 3
    assert torch.equal(data.dev_images[:, 0].mean(2).argmax(1), data.dev_labels * 2 + 4)
    assert torch.equal(data.train_images[:, 0].mean(2).argmax(1), data.train_labels * 2 + 4)
    seen = {picture.numpy().tobytes() for picture in data.train_images}
    assert len(seen) == 200 and not seen & {picture.numpy().tobytes() for picture in data.dev_images}
    again = load_fashion_mnist(folder)
    assert all(torch.equal(one, other) for one, other in zip(data, again))
    assert len(load_fashion_mnist(folder, dev_images=100).train_labels) == 5100
    assert normalised(torch.full((1, 2, 2), 255)).max() == pytest.approx((1 - 0.2860) / 0.3530)


def test_bad_files_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the four IDX files .* `apt-get download"):
        load_fashion_mnist(tmp_path)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    before = data_hash(tmp_path)
    shutil.copy(tmp_path / FILES["train_images"], tmp_path / FILES["test_images"])
    with pytest.raises(ValueError, match="5200 test images and 200 labels"):
        load_fashion_mnist(tmp_path)
    assert data_hash(tmp_path) != before
    shutil.copy(tmp_path / FILES["test_labels"], tmp_path / FILES["test_images"])
    with pytest.raises(ValueError, match="is no IDX file of bytes with 3 axes"):
        load_fashion_mnist(tmp_path)


def test_augmentation_moves_and_mirrors_whole_pictures():
    images = torch.randn(64, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    assert torch.equal(augmented(images, 0, 0.0, generator), images)
    assert torch.equal(augmented(images, 0, 1.0, generator), images.flip(3))
    moved = augmented(images, 1, 0.0, generator)
    inner, found = images[:, 0, 1:-1, 1:-1], set()
    for before, after in zip(inner, moved[:, 0]):
        places = [(y, x) for y in range(3) for x in range(3) if torch.equal(after[y : y + 4, x : x + 4], before)]
        assert len(places) == 1
        found.add(places[0])
    assert len(found) == 9


def test_the_learning_rate_rises_and_falls():
    factors = [rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == 1.0 == factors[9] and factors[-1] < 1e-3
    assert factors[10:] == sorted(factors[10:], reverse=True)


def small(seed=0):
    arguments = ["--data", ".", "--out", ".", "--embed-dim", "16", "--depth", "2", "--heads", "2", "--seed", str(seed)]
    return train_vit.build(train_vit.parse(arguments)), Training(epochs=2, batch_size=20, seed=seed)


def test_a_resumed_run_is_the_uninterrupted_one(folder, tmp_path):
    data = load_fashion_mnist(folder, dev_images=5140)
    model, settings = small()
    whole = train(model, data, settings, tmp_path / "whole")

    class Interrupted(Exception):
        pass

    def stop(module, inputs):
        if (tmp_path / "part" / "checkpoint").exists():
            raise Interrupted

    part, _ = small()
    handle = part.register_forward_pre_hook(stop)
    with pytest.raises(Interrupted):
        train(part, data, settings, tmp_path / "part")
    handle.remove()
    fresh, _ = small()
    with pytest.raises(ValueError, match="is of an earlier run; expected none. Pass --resume"):
        train(fresh, data, settings, tmp_path / "part")
    with pytest.raises(ValueError, match="was made with .* expected the same"):
        train(fresh, data, dataclasses.replace(settings, seed=1), tmp_path / "part", resume=True)
    resumed = train(fresh, data, settings, tmp_path / "part", resume=True)
    assert resumed.curve == whole.curve and resumed.epoch == 2
    assert all(torch.equal(one, other) for one, other in zip(fresh.state_dict().values(), model.state_dict().values()))


def test_it_learns_and_writes_a_model_that_can_be_pruned(folder, tmp_path, capsys):
    arguments = ["--data", str(folder), "--out", str(tmp_path), "--embed-dim", "16", "--depth", "3", "--heads", "2"]
    train_vit.main([*arguments, "--epochs", "20", "--batch-size", "20", "--learning-rate", "5e-3"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert json.loads(capsys.readouterr().out) == result["figures"]
    assert result["figures"]["test_accuracy"] > 0.8 and result["data"]["sha256"] == data_hash(folder)
    assert {"command", "versions", "device", "seeds", "settings", "curve"} <= set(result)
    model = gp.load_model(tmp_path / "model")
    data = load_fashion_mnist(folder)
    assert accuracy(model, data.test_images, data.test_labels) == result["figures"]["test_accuracy"]
    assert len(gp.find_sites(model, "block")) == 3
    plan = gp.make_plan(model, gp.Random(keep=0.7, kinds=("block",)))
    assert gp.cut(model, plan)(data.test_images[:2]).shape == (2, 10)
