"""What a bare model is recovered on: a user's inputs and targets of a denoiser, or images and labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from genprune.errors import BadCalibrationData
from genprune.recovery.distillation import NormalizedDistillation
from genprune.recovery.draws import Shuffled
from genprune.recovery.rows import LabelledImages, NoisedRows

_ADVICE = (
    "Pass data=[(images, labels), ...] or a dataset of (image, label) for a classifier, data=[(inputs, target), ...] "
    "with a dictionary of arguments for a denoiser; or pass the pipelines with prompts."
)


@dataclass
class DenoiserData:
    """A user's `(inputs, target)` batches, row by row. A tensor with as many rows as the target is split, others are
    shared.

    Args:
        batches: held as they came.
        table: (batch, row in it) of every row.
    """

    batches: list[tuple[Mapping[str, Any], Tensor]] = field(repr=False)
    table: list[tuple[int, int]] = field(repr=False)
    settings: NormalizedDistillation
    fingerprint: str

    def __post_init__(self) -> None:
        self.order = Shuffled(len(self.table), self.settings.seed)

    def rows(self, indices: Iterable[int]) -> NoisedRows:
        picked = [self.table[self.order.item(index)] for index in indices]
        inputs = [_row(self.batches[batch][0], row, len(self.batches[batch][1])) for batch, row in picked]
        targets = [self.batches[batch][1][row] for batch, row in picked]
        return NoisedRows(_joined(inputs), torch.stack(targets).float())


@dataclass
class ImageData:
    """Images and labels: batches held as they came, or a dataset that is read sample by sample.

    Random augmentation inside a dataset draws from torch's generator, seeded by the global sample index, so that a
    resumed run sees the same pictures.
    """

    batches: Any = field(repr=False)
    table: list[tuple[int, int]] | None = field(repr=False)
    settings: NormalizedDistillation
    fingerprint: str

    def __post_init__(self) -> None:
        size = len(self.batches) if self.table is None else len(self.table)
        self.order = Shuffled(size, self.settings.seed)

    def rows(self, indices: Iterable[int]) -> LabelledImages:
        pairs = [self._sample(index) for index in indices]
        images = torch.stack([image for image, _ in pairs])
        labels = torch.stack([torch.as_tensor(label) for _, label in pairs])
        return LabelledImages(images, labels, self.settings.classifier_output, self.settings.temperature)

    def _sample(self, index: int) -> tuple[Tensor, Any]:
        item = self.order.item(index)
        if self.table is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed((self.settings.seed * 1_000_003 + index) % 2**63)
                return self.batches[item]
        batch, row = self.table[item]
        images, labels = self.batches[batch]
        return images[row], labels[row]


def own_data(model: torch.nn.Module, data: Any, settings: NormalizedDistillation) -> DenoiserData | ImageData:
    """A user's data for a bare model.

    Raises:
        BadCalibrationData: there are none, or they are of no known shape.
    """
    if data is None:
        raise BadCalibrationData(f"{type(model).__name__} is a bare model and got no data. {_ADVICE}")
    if settings.min_snr_gamma is not None or settings.prompt_dropout:
        raise BadCalibrationData(
            "min_snr_gamma and prompt_dropout need a pipeline's scheduler and prompts; expected neither with data of "
            "your own. Leave them out, or pass the pipelines."
        )
    if _is_dataset(data):
        return ImageData(data, None, settings, f"dataset of {len(data)}")
    batches = list(data)
    if not batches:
        raise BadCalibrationData(f"data holds no batch; expected at least one. {_ADVICE}")
    for number, batch in enumerate(batches, start=1):
        _check_batch(number, batch, type(batches[0][0]) if isinstance(batches[0], (tuple, list)) else None)
    table = [(number, row) for number, (_, answer) in enumerate(batches) for row in range(len(answer))]
    digest = hashlib.sha256()
    for _, answer in batches:
        digest.update(answer.detach().cpu().float().contiguous().numpy().tobytes())
    kind = DenoiserData if isinstance(batches[0][0], Mapping) else ImageData
    return kind(batches, table, settings, digest.hexdigest())


def _is_dataset(data: Any) -> bool:
    """Whether items are single `(image, label)` samples."""
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or not len(data):
        return False
    first = data[0]
    return isinstance(first, (tuple, list)) and isinstance(first[0], Tensor) and first[0].ndim == 3


def _check_batch(number: int, batch: Any, kind: type | None) -> None:
    is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor)
    if not is_pair or not isinstance(batch[0], (Mapping, Tensor)):
        raise BadCalibrationData(f"batch {number} is a {type(batch).__name__} that genprune cannot read. {_ADVICE}")
    given, answer = batch
    if isinstance(given, Mapping) != issubclass(kind, Mapping):
        raise BadCalibrationData(f"batch {number} is of another kind than batch 1; expected one kind. {_ADVICE}")
    if isinstance(given, Tensor) and answer.shape != given.shape[:1]:
        raise BadCalibrationData(
            f"batch {number} has images {tuple(given.shape)} and labels {tuple(answer.shape)}; expected one label per "
            f"image, ({given.shape[0]},). {_ADVICE}"
        )


def _row(value: Any, row: int, rows: int) -> Any:
    """One row of everything that has `rows` of them, as a list of one; shared values as they are."""
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows:
        return [value[row]]
    if isinstance(value, Mapping):
        return {name: _row(item, row, rows) for name, item in value.items()}
    return value


def _joined(rows: list[Any]) -> Any:
    first = rows[0]
    if isinstance(first, list):
        return torch.stack([row[0] for row in rows])
    if isinstance(first, Mapping):
        return {name: _joined([row[name] for row in rows]) for name in first}
    return first
