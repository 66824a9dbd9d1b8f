"""Where captioned pictures come from: the emoji grammar by default, else a hub dataset or a folder of images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from genprune.miniature import grammar


class EmojiScenes:
    """Endless train scenes of the grammar; picture number i depends on (seed, i) alone."""

    def __init__(self, seed: int = 0, count: int = 32_768) -> None:
        self.seed, self.count = seed, count

    def captions(self) -> list[str]:
        return [grammar.caption(scene) for scene in grammar.scenes("train", self.count, self.seed)]

    def pictures(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[np.ndarray]:
        """uint8 batches `(B, 64, 64, 3)` in order; process `rank` of `world` gets every world-th batch."""
        for start in range(rank * batch_size, self.count, batch_size * world):
            batch = grammar.scenes("train", min(batch_size, self.count - start), self.seed, start)
            yield np.stack([grammar.render(scene) for scene in batch])

    def preview_captions(self, n: int) -> list[str]:
        return [grammar.caption(scene) for scene in grammar.scenes("dev", n, seed=0)]


class CaptionedImages:
    """Pictures and captions of a `datasets` dataset: a hub name, or a folder in the imagefolder layout.

    Args:
        dataset_name: hub id; give this or `train_data_dir`.
        train_data_dir: folder with images and `metadata.jsonl`.
        image_column, caption_column: names of the columns.
        side: pictures are scaled and centre-cropped to this many px.

    Raises:
        ModuleNotFoundError: `datasets` is not installed.
        ValueError: a column does not exist.
    """

    def __init__(
        self,
        dataset_name: str | None,
        train_data_dir: Path | None,
        image_column: str = "image",
        caption_column: str = "text",
        side: int = grammar.SIDE,
        count: int | None = None,
    ) -> None:
        try:
            from datasets import load_dataset
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("reading image datasets needs `pip install datasets`") from error
        if dataset_name:
            self.rows = load_dataset(dataset_name, split="train")
        else:
            self.rows = load_dataset("imagefolder", data_dir=str(train_data_dir), split="train")
        for column in (image_column, caption_column):
            if column not in self.rows.column_names:
                raise ValueError(
                    f"no column {column!r} in the dataset, which has {', '.join(self.rows.column_names)}; "
                    "set --image_column and --caption_column"
                )
        self.count = min(count or len(self.rows), len(self.rows))
        self.image_column, self.caption_column, self.side = image_column, caption_column, side

    def captions(self) -> list[str]:
        texts = self.rows.select(range(self.count))[self.caption_column]
        return [text if isinstance(text, str) else text[0] for text in texts]

    def pictures(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[np.ndarray]:
        for start in range(rank * batch_size, self.count, batch_size * world):
            rows = range(start, min(start + batch_size, self.count))
            yield np.stack([self.picture(row) for row in rows])

    def picture(self, index: int) -> np.ndarray:
        """Picture number `index`, uint8 `(side, side, 3)`."""
        image = self.rows[int(index)][self.image_column].convert("RGB")
        edge = min(image.size)
        left, top = (image.width - edge) // 2, (image.height - edge) // 2
        image = image.crop((left, top, left + edge, top + edge))
        return np.asarray(image.resize((self.side, self.side), Image.Resampling.LANCZOS))

    def preview_captions(self, n: int) -> list[str]:
        return self.captions()[:n]


def shuffled_rows(step: int, batch_size: int, count: int, seed: int) -> Tensor:
    """Row numbers of batch number `step`: every epoch is its own permutation of all rows, so position = step."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // count
    rows = torch.empty_like(positions)
    for epoch in epochs.unique().tolist():
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        permutation = torch.randperm(count, generator=generator)
        chosen = epochs == epoch
        rows[chosen] = permutation[positions[chosen] % count]
    return rows
