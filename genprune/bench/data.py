"""Prompts and the real pictures they describe: the miniature's test split, MS-COCO, a hub data set, or a text file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from genprune.bench.run import text_hash
from genprune.errors import GenpruneError
from genprune.metrics.errors import need

Loader = Callable[[], object]  # gives a PIL image or a uint8 array (H, W, 3)


@dataclass(frozen=True)
class BenchData:
    """What is drawn and what it is compared with.

    Attributes:
        name: e.g. `miniature test split`.
        prompts: one an image.
        real: loaders of real pictures, described by the prompts (photographs) or not (the miniature); may be empty.
        scenes: the miniature's scene behind each prompt, for its grader; else None.
        source: where it comes from (split, seed, files), for the result's provenance.
    """

    name: str
    prompts: tuple[str, ...]
    real: tuple[Loader, ...] = ()
    scenes: tuple | None = None
    source: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise GenpruneError(f"{self.name} gave no prompts, expected at least one. Check its path and columns.")

    def real_batches(self, size: tuple[int, int], batch_size: int = 32) -> Iterator[Tensor]:
        """Real pictures as `uint8` batches `(B, 3, H, W)`, cropped to the shape of `size` and resized to it.

        Args:
            size: `(height, width)` px of the drawn pictures.
        """
        for start in range(0, len(self.real), batch_size):
            yield torch.stack([_fit(load(), size) for load in self.real[start : start + batch_size]])

    def provenance(self) -> dict:
        """Name, source, counts and hashes; reads every real picture once."""
        digest = hashlib.sha256()
        for load in self.real:
            image = _pil(load())
            digest.update(f"{image.size}".encode())
            digest.update(image.tobytes())
        return {
            "name": self.name,
            **self.source,
            "prompts": len(self.prompts),
            "prompts_hash": text_hash(self.prompts),
            "real_images": len(self.real),
            "real_hash": f"sha256:{digest.hexdigest()}" if self.real else None,
        }


def _pil(image):
    from PIL import Image

    return image.convert("RGB") if isinstance(image, Image.Image) else Image.fromarray(image).convert("RGB")


def _fit(image, size: tuple[int, int]) -> Tensor:
    import numpy as np
    from PIL import Image, ImageOps

    image = _pil(image)
    if image.size != size[::-1]:
        image = ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)  # centre crop, then antialiased
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def miniature_data(split: str = "test", count: int = 64, seed: int = 0, real_count: int | None = None) -> BenchData:
    """Captions of the embedded miniature's scenes, and renderings of *other* scenes; needs nothing but the package.

    Other scenes, because a caption here all but determines its picture: against its own scenes' pictures a good model
    would look closer to reality than reality is to itself, and the floor would mean nothing.

    Args:
        split: `dev` to tune on, `test` to report.
        count: prompts.
        seed: of the scenes.
        real_count: real pictures, default twice the prompts, so that the floor has both halves at full size.
    """
    from genprune.miniature import grammar

    scenes = grammar.scenes(split, count, seed)
    others = grammar.scenes(split, 2 * count if real_count is None else real_count, seed, start=count)
    return BenchData(
        name=f"miniature {split} split",
        prompts=tuple(grammar.caption(scene) for scene in scenes),
        real=tuple(lambda scene=scene: grammar.render(scene) for scene in others),
        scenes=tuple(scenes),
        source={"split": split, "seed": seed},
    )


def coco_data(
    captions: str | Path, images: str | Path, count: int = 1000, seed: int = 0, real_count: int | None = None
) -> BenchData:
    """MS-COCO's annotation format: `captions_val2014.json` and the folder `val2014`. One caption a picture.

    Args:
        captions: JSON with `images` (`id`, `file_name`) and `annotations` (`image_id`, `caption`).
        images: folder of the files.
        count: prompts, a random sample of the pictures.
        seed: of the sample.
        real_count: real pictures, default twice the prompts where there are as many.

    Raises:
        GenpruneError: the file has another format, or a picture is not in the folder.
    """
    try:
        listed = json.loads(Path(captions).read_text())
        files = {item["id"]: item["file_name"] for item in listed["images"]}
        texts: dict = {}
        for note in sorted(listed["annotations"], key=lambda note: note.get("id", 0)):
            texts.setdefault(note["image_id"], note["caption"].strip())
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise GenpruneError(
            f"{captions} cannot be read as MS-COCO captions ({type(error).__name__}: {error}). "
            "Expected JSON with 'images' and 'annotations', such as captions_val2014.json."
        ) from error
    chosen = sorted(texts.keys() & files.keys(), key=str)
    random.Random(seed).shuffle(chosen)
    paths = [Path(images) / files[key] for key in chosen[: max(real_count or 2 * count, count)]]
    absent = next((path for path in paths if not path.is_file()), None)
    if absent is not None:
        raise GenpruneError(f"{captions} lists {absent.name}, which is not in {images}. Pass the matching folder.")
    return BenchData(
        name="MS-COCO format",
        prompts=tuple(texts[key] for key in chosen[:count]),
        real=tuple(lambda path=path: _open(path) for path in paths),
        source={"captions_file": Path(captions).name, "seed": seed},
    )


def _open(path: Path):
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def dataset_data(
    dataset_name: str,
    image_column: str = "image",
    caption_column: str = "text",
    split: str = "test",
    count: int = 1000,
    seed: int = 0,
    real_count: int | None = None,
) -> BenchData:
    """A data set of captioned pictures from the Hugging Face hub, or a local folder that `datasets` can load.

    Args:
        dataset_name: hub id or folder.
        image_column, caption_column: its columns; a list of captions gives its first.
        split, count, seed, real_count: as in `coco_data`.

    Raises:
        GenpruneError: a column does not exist.
        ModuleNotFoundError: `datasets` is not installed.
    """
    rows = need("datasets", install="genprune[train]").load_dataset(dataset_name, split=split)
    for column in (image_column, caption_column):
        if column not in rows.column_names:
            raise GenpruneError(
                f"data set '{dataset_name}' has no column '{column}', it has {', '.join(rows.column_names)}. "
                "Pass --image_column and --caption_column."
            )
    rows = rows.shuffle(seed=seed)
    captions = rows.select(range(min(count, len(rows))))[caption_column]
    return BenchData(
        name=dataset_name,
        prompts=tuple(text if isinstance(text, str) else text[0] for text in captions),
        real=tuple(
            lambda row=row: rows[row][image_column]
            for row in range(min(max(real_count or 2 * count, count), len(rows)))
        ),
        source={"split": split, "seed": seed, "image_column": image_column, "caption_column": caption_column},
    )


def prompt_data(prompts: Sequence[str] | str | Path) -> BenchData:
    """Prompts alone, from a list or a text file with one a line: paired metrics only, no set distances.

    Raises:
        GenpruneError: the file cannot be read or holds no prompt.
    """
    if isinstance(prompts, str | Path):
        try:
            lines = Path(prompts).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise GenpruneError(f"the prompts file {prompts} cannot be read ({error}). One prompt a line.") from error
        return BenchData(Path(prompts).name, tuple(line.strip() for line in lines if line.strip()))
    return BenchData("prompts", tuple(prompts))


def first(data: BenchData, count: int) -> BenchData:
    """The same with at most `count` prompts (and twice as many real pictures)."""
    if count >= len(data.prompts):
        return data
    scenes = None if data.scenes is None else data.scenes[:count]
    return dataclasses.replace(data, prompts=data.prompts[:count], real=data.real[: 2 * count], scenes=scenes)
