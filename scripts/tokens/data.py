"""Labelled pictures at 224 px for probes: Fashion-MNIST, enlarged, and the groups of Fluent 3-D emoji.

Three splits each. Probes are trained on `train`; whatever is decided is decided on `dev`; `test` is only reported.
Emoji are split *by concept* (a man, a woman and a person who do the same are one concept), never by file.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from scripts.vit.data import MEAN, STD, load_fashion_mnist
from scripts.vit.data import data_hash as fashion_hash

SIDE = 224  # px, what the backbone is given
SPLITS = ("train", "dev", "test")
FASHION_COUNTS = {"train": 3_000, "dev": 500, "test": 1_000}
EMOJI_SHARES = {"train": 0.55, "dev": 0.15, "test": 0.3}  # of the concepts
SEED = 0
GROUPS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
)
SKIN_TONES = {f"1f3f{tone}" for tone in "bcdef"}
# say who, not what: left out of a concept's name
PERSONS = {"fe0f", "200d", "2640", "2642", "1f468", "1f469", "1f9d1", "1f466", "1f467", "1f9d2"}
HOW_TO_GET = (
    "Get them with `npm pack @lobehub/fluent-emoji-3d@1.1.0` and `npm pack emoji-datasource@16.0.0`, and pass the "
    "folder that holds both files."
)


@dataclass(frozen=True)
class Pictures:
    """One split. `pixels` uint8 of shape `(n, 1 or 3, h, w)`, in [0, 255]; `labels` int64 of shape `(n,)`."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: slice) -> Tensor:
        """Some of them in colour at 224 px, uint8 of shape `(b, 3, 224, 224)`."""
        found = self.pixels[rows].expand(-1, 3, -1, -1)
        if found.shape[-1] == SIDE:
            return found
        large = functional.interpolate(found.float(), size=(SIDE, SIDE), mode="bicubic", antialias=True)
        return large.round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Task:
    """A classification task.

    Attributes:
        name: `fashion` or `emoji`.
        classes: their names.
        splits: `train`, `dev` and `test`.
        sha256: of what the pictures were made from.
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, Pictures]
    sha256: str


def fashion_task(folder: Path, counts: dict[str, int] = FASHION_COUNTS) -> Task:
    """Some of Fashion-MNIST, drawn with a fixed seed; dev pictures are of the files' training half.

    Raises:
        FileNotFoundError, ValueError: see `load_fashion_mnist`.
    """
    data = load_fashion_mnist(folder)
    splits = {}
    for split in SPLITS:
        images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))[: counts[split]]
        pixels = ((images[order] * STD + MEAN) * 255).round().clamp(0, 255).to(torch.uint8)
        splits[split] = Pictures(pixels, labels[order])
    from scripts.vit.data import CLASSES

    return Task("fashion", CLASSES, splits, fashion_hash(folder))


def emoji_task(folder: Path, most: int | None = None) -> Task:
    """Fluent 3-D emoji on white, labelled by the group they are listed in.

    Args:
        folder: holds the two npm tarballs.
        most: pictures of each split at most, for a quick run; None: all.

    Raises:
        FileNotFoundError: a tarball is not there.
    """
    images, groups = _tarball(folder, "lobehub-fluent-emoji-3d-*.tgz"), _tarball(folder, "emoji-datasource-*.tgz")
    with tarfile.open(groups) as archive:
        listed = json.load(archive.extractfile("package/emoji.json"))
    named = {entry["unified"].lower(): entry["category"] for entry in listed if entry["category"] in GROUPS}
    named = {code: group for code, group in sorted(named.items()) if not SKIN_TONES & set(code.split("-"))}
    splits = split_by_concept(named)
    with tarfile.open(images) as archive:
        files = {Path(member.name).stem: member for member in archive if member.name.endswith(".webp")}
        found = {}
        for split in SPLITS:
            codes = [code for code in splits[split] if code in files][:most]
            pixels = torch.stack([_on_white(archive.extractfile(files[code]).read()) for code in codes])
            found[split] = Pictures(pixels, torch.tensor([GROUPS.index(named[code]) for code in codes]))
    digest = hashlib.sha256(images.read_bytes() + groups.read_bytes()).hexdigest()
    return Task("emoji", GROUPS, found, digest)


def concept(code: str) -> str:
    """What an emoji is about, whoever does it: its code points without persons, genders and joiners."""
    points = code.split("-")
    return "-".join(point for point in points if point not in PERSONS) or points[0]


def split_by_concept(named: dict[str, str]) -> dict[str, list[str]]:
    """Code points of each split in a random order; all emoji of one concept are in one split."""
    concepts: dict[str, list[str]] = {}
    for code in named:
        concepts.setdefault(concept(code), []).append(code)
    draw = random.Random(SEED)
    order = sorted(concepts)
    draw.shuffle(order)
    splits, start = {}, 0.0
    for split in SPLITS:
        end = start + EMOJI_SHARES[split]
        names = order[round(start * len(order)) : round(end * len(order))]
        splits[split] = [code for name in names for code in concepts[name]]
        draw.shuffle(splits[split])
        start = end
    return splits


def _on_white(data: bytes) -> Tensor:
    """One WebP with transparency as uint8 of shape `(3, 224, 224)`."""
    import numpy
    from PIL import Image

    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(white, picture).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return torch.from_numpy(numpy.asarray(flat).copy()).permute(2, 0, 1).contiguous()


def _tarball(folder: Path, pattern: str) -> Path:
    found = sorted(Path(folder).glob(pattern))
    if not found:
        raise FileNotFoundError(f"no '{pattern}' in '{folder}'. {HOW_TO_GET}")
    return found[-1]
