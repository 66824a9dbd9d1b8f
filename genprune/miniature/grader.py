"""A small network that reads a scene back from its picture: did the picture become what its caption says?

It was trained on pictures drawn by the grammar (train split, blurred and noised at random), never on generated ones.
How well it reads real held-out scenes stands in `docs/results/miniature.json`; no score above that can be trusted.
Its penultimate layer serves as feature extractor of image-set distances. Call those `FD(miniature-grader)` and the
like, never FID.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from . import grammar
from .grammar import Scene

WEIGHTS = "grader.safetensors"
# what is read, and its classes; the last class of the starred ones is "the caption does not say"
ATTRIBUTES: dict[str, tuple] = {
    "object": tuple(grammar.CONCEPTS),
    "other": (*grammar.CONCEPTS, None),  # * the second (right-hand) object
    "count": (1, 2, 3),
    "position": (*grammar.POSITIONS, None),  # *
    "size": (*grammar.SIZES, None),  # *
    "background": tuple(grammar.COLORS),
    "texture": grammar.TEXTURES,
}


class Grader(nn.Module):
    """Convolutional network, 64 px RGB to one row of logits per attribute.

    Args:
        width: channels of the first level; the deeper ones have two and three times as many.
        num_features: length of `features`.
    """

    def __init__(self, width: int = 32, num_features: int = 128) -> None:
        super().__init__()
        self.num_features = num_features

        def level(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU()]

        self.trunk = nn.Sequential(
            *level(3, width, 2),  # (N, W, 32, 32)
            *level(width, 2 * width, 2),  # (N, 2W, 16, 16)
            *level(2 * width, 2 * width, 1),
            *level(2 * width, 3 * width, 2),  # (N, 3W, 8, 8)
            *level(3 * width, 3 * width, 1),
            nn.AvgPool2d(2),  # (N, 3W, 4, 4): the grid stays, since positions and counts are read from it
            nn.Flatten(),
            nn.Linear(3 * width * 16, num_features),
            nn.LayerNorm(num_features),
            nn.SiLU(),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(num_features, len(c)) for name, c in ATTRIBUTES.items()})

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations, float `(N, num_features)`.

        Args:
            images: `(N, 3, 64, 64)`, uint8 in [0, 255] or float in [0, 1].

        Raises:
            ValueError: another shape.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, grammar.SIDE, grammar.SIDE):
            raise ValueError(f"images have shape {tuple(images.shape)}, expected (N, 3, 64, 64); resize first")
        dtype = self.heads["object"].weight.dtype
        scaled = images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)
        return self.trunk(scaled * 2 - 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits `(N, classes)` of every attribute; `images` as in `features`."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}


def load_grader() -> Grader:
    """The embedded grader, float32, in evaluation mode, without gradients.

    Raises:
        FileNotFoundError: the weights are not embedded in this copy of the package.
    """
    from safetensors.torch import load_file

    path = Path(__file__).parent / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"no grader weights at {path}; reinstall genprune with its package data")
    grader = Grader()
    grader.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return grader.eval().requires_grad_(False)


def labels(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Class numbers, int64 `(N,)` per attribute of `ATTRIBUTES`. The second object of a group is the first again."""
    said = {
        "object": [scene.concept for scene in scenes],
        "other": [{"single": None, "group": scene.concept, "pair": scene.other}[scene.kind] for scene in scenes],
        "count": [scene.count for scene in scenes],
        "position": [scene.position for scene in scenes],
        "size": [scene.size for scene in scenes],
        "background": [scene.background for scene in scenes],
        "texture": [scene.texture for scene in scenes],
    }
    return {name: torch.tensor([ATTRIBUTES[name].index(v) for v in values]) for name, values in said.items()}


def said(truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where a caption says something about an attribute: boolean `(N,)` per attribute."""
    return {
        name: classes != (len(ATTRIBUTES[name]) - 1 if ATTRIBUTES[name][-1] is None else -1)
        for name, classes in truth.items()
    }


def compare(read: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Share of right classes per attribute, over the scenes whose caption says it; `all`: everything said is right.

    An attribute that no caption mentions is left out.
    """
    mentioned = said(truth)
    right = {name: read[name] == truth[name] for name in truth}
    figures = {name: right[name][mentioned[name]].float().mean().item() for name in truth if mentioned[name].any()}
    every = torch.stack([right[name] | ~mentioned[name] for name in truth]).all(dim=0)
    return {**figures, "all": every.float().mean().item()}


@torch.no_grad()
def read(images: Tensor, grader: Grader | None = None, batch_size: int = 256) -> dict[str, Tensor]:
    """Most likely class number, int64 `(N,)` per attribute. `images`: `(N, 3, 64, 64)`, uint8 or float in [0, 1]."""
    grader = load_grader() if grader is None else grader
    device = next(grader.parameters()).device
    batches = [grader(batch.to(device)) for batch in images.split(batch_size)]
    return {name: torch.cat([logits[name].argmax(-1).cpu() for logits in batches]) for name in ATTRIBUTES}


def grade(images: Tensor, scenes: Sequence[Scene], grader: Grader | None = None) -> dict[str, float]:
    """How often the pictures show what the scenes' captions say.

    Args:
        images: `(N, 3, 64, 64)`, uint8 in [0, 255] or float in [0, 1]; picture i was drawn from scene i's caption.
        scenes: N scenes.
        grader: `load_grader()` by default.

    Returns:
        Accuracy in [0, 1] per attribute over the scenes that mention it, and `all`, the share of pictures in which
        everything said is right. Compare with `chance(scenes)`.

    Raises:
        ValueError: not as many pictures as scenes, or no pictures.
    """
    if len(images) != len(scenes) or not len(scenes):
        raise ValueError(f"{len(images)} pictures for {len(scenes)} scenes; give one picture for each of >= 1 scenes")
    return compare(read(images, grader), labels(scenes))


def chance(scenes: Sequence[Scene], seed: int = 0, rounds: int = 20) -> dict[str, float]:
    """`grade`'s expected figures where the pictures show random train scenes, read without error."""
    truth = labels(scenes)
    guesses = [labels(grammar.scenes("train", len(scenes), seed=seed + 1000 + number)) for number in range(rounds)]
    figures = [compare(guess, truth) for guess in guesses]
    return {name: sum(figure[name] for figure in figures) / rounds for name in figures[0]}
