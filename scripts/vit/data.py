"""Fashion-MNIST from its IDX files: 55,000 training, 5,000 development and 10,000 test images of 28 x 28 pixels."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

FILES = {
    "train_images": "train-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "test_images": "t10k-images-idx3-ubyte.gz",
    "test_labels": "t10k-labels-idx1-ubyte.gz",
}
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DEV_IMAGES = 5_000  # of the training images, held out for decisions; the test images are for reported figures only
DEV_SEED = 20_170_825
# of the 60,000 training images, as shares of white
MEAN, STD = 0.2860, 0.3530
HOW_TO_GET = (
    "Get it with `apt-get download dataset-fashion-mnist` and `dpkg-deb -x dataset-fashion-mnist*.deb FOLDER` (no "
    "root needed), and pass FOLDER/usr/share/datasets/fashion-mnist."
)


class FashionMNIST(NamedTuple):
    """Images are float32 of shape `(n, 1, 28, 28)`, normalised to mean 0 and deviation 1; labels int64 `(n,)`, 0-9."""

    train_images: Tensor
    train_labels: Tensor
    dev_images: Tensor
    dev_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_fashion_mnist(folder: str | Path, dev_images: int = DEV_IMAGES) -> FashionMNIST:
    """All splits; which training images are development images does not depend on anything but their number.

    Args:
        folder: holds the four `*-ubyte.gz` files.
        dev_images: how many training images are held out.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a file is no IDX file, or images and labels differ in number.
    """
    folder = Path(folder)
    images, labels = _read(folder, "train_images"), _read(folder, "train_labels")
    test_images, test_labels = _read(folder, "test_images"), _read(folder, "test_labels")
    for name, pictures, answers in (("train", images, labels), ("test", test_images, test_labels)):
        if len(pictures) != len(answers) or len(pictures) <= (dev_images if name == "train" else 0):
            raise ValueError(
                f"{len(pictures)} {name} images and {len(answers)} labels in '{folder}', {dev_images} of them to hold "
                f"out; expected as many labels as images, and some left to train on. {HOW_TO_GET}"
            )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(DEV_SEED))
    dev, train = order[:dev_images].sort().values, order[dev_images:].sort().values
    images, labels = normalised(images), labels.long()
    return FashionMNIST(
        images[train], labels[train], images[dev], labels[dev], normalised(test_images), test_labels.long()
    )


def normalised(pixels: Tensor) -> Tensor:
    """Bytes of shape `(n, 28, 28)` as the model's input, float32 of shape `(n, 1, 28, 28)`."""
    return (pixels.float().div(255).unsqueeze(1) - MEAN) / STD


def data_hash(folder: str | Path) -> str:
    """SHA-256 over the uncompressed contents of the four files, in the order of `FILES`."""
    found = hashlib.sha256()
    for name in FILES.values():
        found.update(_contents(Path(folder) / name))
    return found.hexdigest()


def _contents(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"no '{path}'; expected the four IDX files of Fashion-MNIST there. {HOW_TO_GET}")
    return gzip.decompress(path.read_bytes())


def _read(folder: Path, name: str) -> Tensor:
    """One IDX file of bytes: magic number (0, 0, 8, axes), the length of each axis, the bytes."""
    path = folder / FILES[name]
    data = _contents(path)
    axes = 3 if name.endswith("images") else 1
    header = 4 + 4 * axes
    shape = tuple(numpy.frombuffer(data[4:header], dtype=">i4").tolist())
    if data[:4] != bytes((0, 0, 8, axes)) or len(data) - header != int(numpy.prod(shape)):
        raise ValueError(
            f"'{path}' is no IDX file of bytes with {axes} axes: it starts with {data[:4]!r} and holds {len(data):,} "
            f"bytes. {HOW_TO_GET}"
        )
    return torch.from_numpy(numpy.frombuffer(data, dtype=numpy.uint8, offset=header).reshape(shape).copy())
