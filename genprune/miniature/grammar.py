"""Composed emoji scenes: a seed gives a `Scene`, a scene gives its exact caption and its picture.

A scene is one object ("a small cat on the left"), two or three alike ("three cats"), or two different ones side by
side ("a cat left of a dog"), before a plain or striped background in one of eight colours. Captions are exact by
construction. Splits are by *combination*: what a caption says belongs to one of train, dev and test, decided by a
stable hash, and some object-on-colour pairs occur in the test split alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SPLITS = ("train", "dev", "test")
SIDE = 64  # px, pictures are square
KINDS = ("single", "group", "pair")
SIZES = ("small", "large")
POSITIONS = ("left", "center", "right")
TEXTURES = ("plain", "striped")
COLORS = {
    "white": (244, 244, 244),
    "black": (38, 38, 42),
    "gray": (140, 143, 148),
    "red": (206, 62, 62),
    "yellow": (244, 212, 88),
    "green": (98, 178, 98),
    "blue": (78, 136, 218),
    "pink": (246, 172, 200),
}
CONCEPTS = (
    "apple banana watermelon carrot pizza donut mushroom cactus cat dog frog pig penguin fish car house umbrella star "
    "diamond snowman"
).split()
# sprites no caption ever names; the autoencoder alone sees them
HELD_OUT_CONCEPTS = ("rocket", "butterfly", "turtle", "burger")
# object on colour: in the test split only, so that a score there cannot come from having seen the two together
HELD_OUT_PAIRS = (
    ("cat", "blue"),
    ("apple", "black"),
    ("penguin", "yellow"),
    ("car", "green"),
    ("donut", "white"),
    ("frog", "pink"),
    ("house", "gray"),
    ("star", "red"),
)

# centres in px and side of the object's box in px
_CENTERS = {
    "small": {"left": 14, "center": 32, "right": 50},
    "large": {"left": 22, "center": 32, "right": 42},
}
_BOX = {"small": 24, "large": 40}
_GROUP_CENTERS = {2: ((17, 32), (47, 32)), 3: ((17, 18), (47, 18), (32, 47))}
_GROUP_BOX = {2: 27, 3: 25}
_NUMBER_WORDS = {2: "two", 3: "three"}


@dataclass(frozen=True)
class GrammarConfig:
    """What scenes may contain; a larger grammar is another value of this class.

    Args:
        concepts: nouns, each a sprite of the atlas.
        backgrounds: names of `COLORS`.
        textures: subset of `TEXTURES`.
        counts: how many alike objects a group may have, from {2, 3}.
        kind_weights: probability of single, group and pair scenes; they add up to 1.
        position_jitter: every object is moved by up to this many px in x and in y.
        color_jitter: every background channel is moved by up to this many levels of 255.
    """

    concepts: tuple[str, ...] = tuple(CONCEPTS)
    backgrounds: tuple[str, ...] = tuple(COLORS)
    textures: tuple[str, ...] = TEXTURES
    counts: tuple[int, ...] = (2, 3)
    kind_weights: tuple[float, float, float] = (0.5, 0.25, 0.25)
    position_jitter: int = 2
    color_jitter: int = 6

    def __post_init__(self) -> None:
        unknown = [word for word in self.backgrounds if word not in COLORS]
        if unknown:
            raise ValueError(f"unknown background {unknown[0]!r}; choose from {', '.join(COLORS)}")
        if abs(sum(self.kind_weights) - 1) > 1e-6 or min(self.kind_weights) < 0:
            raise ValueError(f"kind_weights {self.kind_weights} are no probabilities; give three that add up to 1")
        if self.kind_weights[2] > 0 and len(self.concepts) < 2:
            raise ValueError("pair scenes need two concepts; add one or set the weight of pairs to 0")


DEFAULT = GrammarConfig()


@dataclass(frozen=True)
class Scene:
    """Everything a caption says, plus `jitter`, the seed of what it does not say (offsets of a few px and levels).

    `kind` is single, group or pair. `size` and `position` are set for single scenes only, `other` (the right-hand
    object) for pairs only; `count` is 1 for single scenes, 2 or 3 for groups, 2 for pairs.
    """

    kind: str
    concept: str
    background: str
    texture: str = "plain"
    count: int = 1
    size: str | None = None
    position: str | None = None
    other: str | None = None
    jitter: int = 0

    @property
    def combination(self) -> tuple:
        """What the caption says, without the jitter: the thing that splits are made of."""
        return (
            self.kind,
            self.concept,
            self.background,
            self.texture,
            self.count,
            self.size,
            self.position,
            self.other,
        )


def caption(scene: Scene) -> str:
    """The one exact caption of a scene, 8 to 12 words."""
    if scene.kind == "single":
        place = "in the center" if scene.position == "center" else f"on the {scene.position}"
        objects = f"a {scene.size} {scene.concept} {place}"
    elif scene.kind == "group":
        objects = f"{_NUMBER_WORDS[scene.count]} {plural(scene.concept)}"
    else:
        objects = f"{_article(scene.concept)} {scene.concept} left of {_article(scene.other)} {scene.other}"
    striped = "striped " if scene.texture == "striped" else ""
    return f"{objects}, {striped}{scene.background} background"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def plural(word: str) -> str:
    """Plural of one of the grammar's nouns."""
    return {"fish": "fish", "cactus": "cacti", "snowman": "snowmen"}.get(word, word + "s")


def split_of(scene: Scene) -> str:
    """The one split that a scene's combination belongs to: about 84 % train, 6 % dev, 10 % test.

    Held-out object-on-colour pairs are always test. The hash is SHA-256 of the combination, so neither Python's hash
    seed nor a larger grammar moves a combination from one split to another.
    """
    if any((word, scene.background) in HELD_OUT_PAIRS for word in (scene.concept, scene.other)):
        return "test"
    text = json.dumps(scene.combination)
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    return "train" if bucket < 84 else "dev" if bucket < 90 else "test"


def sample_scene(rng: np.random.Generator, split: str = "train", grammar: GrammarConfig = DEFAULT) -> Scene:
    """Draw one scene of `split`. Equal generators give equal scenes.

    Raises:
        ValueError: `split` is none of train, dev and test.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
    while True:
        scene = _any_scene(rng, grammar)
        if split_of(scene) == split:
            return scene


def _any_scene(rng: np.random.Generator, grammar: GrammarConfig) -> Scene:
    kind = KINDS[int(rng.choice(3, p=grammar.kind_weights))]
    concept = grammar.concepts[rng.integers(len(grammar.concepts))]
    background = grammar.backgrounds[rng.integers(len(grammar.backgrounds))]
    texture = grammar.textures[rng.integers(len(grammar.textures))]
    common = {"kind": kind, "concept": concept, "background": background, "texture": texture}
    if kind == "single":
        common |= {"size": SIZES[rng.integers(2)], "position": POSITIONS[rng.integers(3)]}
    elif kind == "group":
        common |= {"count": int(grammar.counts[rng.integers(len(grammar.counts))])}
    else:
        rest = [word for word in grammar.concepts if word != concept]
        common |= {"count": 2, "other": rest[rng.integers(len(rest))]}
    return Scene(**common, jitter=int(rng.integers(2**31)))


def scenes(split: str, n: int, seed: int = 0, start: int = 0, grammar: GrammarConfig = DEFAULT) -> list[Scene]:
    """Scenes number `start` to `start + n - 1` of an endless sequence; number i depends on (seed, split, i) alone."""
    import numpy as np

    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
    key = (seed, SPLITS.index(split))
    return [sample_scene(np.random.default_rng((*key, i)), split, grammar) for i in range(start, start + n)]


def render(scene: Scene, side: int = SIDE, grammar: GrammarConfig = DEFAULT) -> np.ndarray:
    """The picture of a scene: uint8, shape `(side, side, 3)`, the same for the same scene on every machine."""
    import numpy as np

    rng = np.random.default_rng(scene.jitter)
    color = np.array(COLORS[scene.background]) + rng.integers(-grammar.color_jitter, grammar.color_jitter + 1, 3)
    canvas = background(color, scene.texture, side)
    unit = side / SIDE
    for word, (x, y), box in _layout(scene):
        dx, dy = rng.integers(-grammar.position_jitter, grammar.position_jitter + 1, 2)
        box = box + int(rng.integers(-1, 2))
        paste(canvas, word, (x + dx) * unit, (y + dy) * unit, round(box * unit))
    return canvas


def _layout(scene: Scene) -> list[tuple[str, tuple[int, int], int]]:
    """(word, centre, box side) of every object in drawing order, in px of a 64 px picture."""
    if scene.kind == "single":
        return [(scene.concept, (_CENTERS[scene.size][scene.position], 32), _BOX[scene.size])]
    centers = _GROUP_CENTERS[scene.count]
    words = (scene.concept,) * scene.count if scene.kind == "group" else (scene.concept, scene.other)
    return [(word, center, _GROUP_BOX[scene.count]) for word, center in zip(words, centers, strict=True)]


def background(color: np.ndarray, texture: str, side: int = SIDE) -> np.ndarray:
    """An empty canvas, uint8 `(side, side, 3)`; striped means eight horizontal bands, every other one shaded."""
    import numpy as np

    color = np.clip(np.asarray(color, dtype=np.float64), 0, 255)
    canvas = np.empty((side, side, 3), dtype=np.uint8)
    canvas[:] = color.round().astype(np.uint8)
    if texture == "striped":
        # dark colours are lightened, so that stripes show on every background
        shaded = color * 0.76 if color.sum() > 200 else color + 56
        band = (np.arange(side) * 8 // side) % 2 == 1
        canvas[band] = shaded.round().astype(np.uint8)
    return canvas


def paste(canvas: np.ndarray, word: str, x: float, y: float, box: int) -> None:
    """Draw a sprite, its longer side `box` px, centred at (x, y), onto `canvas` in place; what sticks out is cut."""
    sprite = _sprite(word, box)
    side = canvas.shape[0]
    left, top = round(x - box / 2), round(y - box / 2)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + box, side), min(top + box, side)
    if x0 >= x1 or y0 >= y1:
        return
    part = sprite[y0 - top : y1 - top, x0 - left : x1 - left]
    alpha = part[..., 3:].astype("float32") / 255
    blend = canvas[y0:y1, x0:x1] * (1 - alpha) + part[..., :3] * alpha
    canvas[y0:y1, x0:x1] = (blend + 0.5).astype("uint8")


@functools.lru_cache(maxsize=2048)
def _sprite(word: str, box: int) -> np.ndarray:
    """Sprite scaled to `box` px, uint8 `(box, box, 4)`."""
    import numpy as np
    from PIL import Image

    atlas, cells = _atlas()
    if word not in cells["sprites"]:
        raise KeyError(f"no sprite for {word!r}; the atlas has {', '.join(cells['sprites'])}")
    cell, place = cells["cell"], cells["sprites"][word]
    picture = atlas.crop((place["x"], place["y"], place["x"] + cell, place["y"] + cell))
    return np.asarray(picture.resize((box, box), Image.Resampling.LANCZOS))


@functools.lru_cache(maxsize=1)
def _atlas():
    from PIL import Image

    folder = Path(__file__).parent
    cells = json.loads((folder / "sprites.json").read_text())
    with Image.open(folder / "sprites.png") as picture:
        return picture.convert("RGBA"), cells
