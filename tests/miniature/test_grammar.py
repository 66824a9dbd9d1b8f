"""The grammar: equal seeds give equal scenes, captions say what is drawn, splits never overlap."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from genprune import miniature
from genprune.miniature import grammar
from genprune.miniature.grammar import Scene, caption, render, scenes, split_of

ROOT = Path(__file__).parents[2]


def test_scenes_and_pictures_are_a_function_of_seed_and_index():
    first, again = scenes("train", 20, seed=3), scenes("train", 20, seed=3)
    assert first == again
    assert scenes("train", 8, seed=3, start=12) == first[12:]
    assert scenes("train", 20, seed=4) != first
    assert all(np.array_equal(render(a), render(b)) for a, b in zip(first, again, strict=True))
    picture = render(first[0])
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8


def test_scenes_do_not_depend_on_the_process():
    code = "from genprune.miniature import prompts; print(prompts('test', 5, 7))"
    fixed = {"capture_output": True, "text": True, "check": True, "cwd": ROOT}
    outputs = {
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, **fixed).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{miniature.prompts('test', 5, 7)}\n"}


def test_splits_are_disjoint_by_combination():
    seen = {split: {scene.combination for scene in scenes(split, 400)} for split in grammar.SPLITS}
    assert not seen["train"] & seen["dev"] and not seen["train"] & seen["test"] and not seen["dev"] & seen["test"]
    for split, combinations in seen.items():
        assert all(split_of(Scene(*c[:2], *c[2:4], *c[4:])) == split for c in combinations)


def test_held_out_pairs_occur_in_test_only():
    def pairs(split: str) -> set:
        return {(word, s.background) for s in scenes(split, 3000) for word in (s.concept, s.other) if word}

    held_out = set(grammar.HELD_OUT_PAIRS)
    assert not held_out & pairs("train") and not held_out & pairs("dev")
    assert held_out <= pairs("test")


def test_held_out_concepts_are_never_named():
    text = " ".join(caption(scene) for split in grammar.SPLITS for scene in scenes(split, 1000))
    assert not any(word in text for word in grammar.HELD_OUT_CONCEPTS)


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        (
            Scene("single", "apple", "red", "striped", size="large", position="left"),
            "a large apple on the left, striped red background",
        ),
        (
            Scene("single", "cat", "white", size="small", position="center"),
            "a small cat in the center, white background",
        ),
        (Scene("group", "snowman", "blue", count=3), "three snowmen, blue background"),
        (Scene("pair", "apple", "pink", count=2, other="umbrella"), "an apple left of an umbrella, pink background"),
    ],
)
def test_captions(scene: Scene, text: str):
    assert caption(scene) == text


def test_one_caption_for_one_combination():
    many = scenes("train", 3000)
    assert len({scene.combination for scene in many}) == len({caption(scene) for scene in many})


def ink(scene: Scene) -> np.ndarray:
    """Where the picture of a scene on a plain background differs from its corner, boolean `(64, 64)`."""
    picture = render(scene).astype(int)
    return np.abs(picture - picture[0, -1]).max(-1) > 12


def test_pictures_show_position_and_size():
    def center_of(position: str, size: str) -> tuple[float, int]:
        mask = ink(Scene("single", "star", "white", size=size, position=position, jitter=5))
        return np.nonzero(mask)[1].mean(), mask.sum()

    left, middle, right = (center_of(position, "small")[0] for position in grammar.POSITIONS)
    assert left < 22 < middle < 42 < right
    assert center_of("center", "large")[1] > 2 * center_of("center", "small")[1]


def test_pictures_show_background_and_texture():
    for name, color in grammar.COLORS.items():
        plain = render(Scene("single", "star", name, size="small", position="left", jitter=1))
        assert np.abs(plain[0, -1].astype(int) - color).max() <= grammar.DEFAULT.color_jitter
        striped = render(Scene("single", "star", name, "striped", size="small", position="left", jitter=1))
        assert np.abs(striped[0, -1].astype(int) - striped[8, -1]).max() > 20


def test_bad_arguments_say_what_to_choose():
    with pytest.raises(ValueError, match="choose one of train, dev, test"):
        scenes("valid", 1)
    with pytest.raises(ValueError, match="unknown background 'mauve'"):
        grammar.GrammarConfig(backgrounds=("mauve",))
    with pytest.raises(ValueError, match="add up to 1"):
        grammar.GrammarConfig(kind_weights=(0.5, 0.1, 0.1))
    with pytest.raises(KeyError, match="no sprite for 'zebra'"):
        grammar.paste(np.zeros((64, 64, 3), np.uint8), "zebra", 32, 32, 20)
