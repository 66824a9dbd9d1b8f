"""What comparisons say about pictures whose differences are known."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from metrics.tiny_extractors import TinyNet, tiny_clip
from PIL import Image

from genprune.bench import compare_images, grader_extractor, miniature_data, scene_grader
from genprune.metrics import ClipExtractor, FeatureExtractor, psnr
from genprune.miniature import render

COUNT = 10


@pytest.fixture(scope="module")
def data():
    return miniature_data("test", count=COUNT)


@pytest.fixture(scope="module")
def right(data):
    """What the prompts say, `uint8 (COUNT, 3, 64, 64)`."""
    return torch.stack([torch.from_numpy(render(scene)).permute(2, 0, 1) for scene in data.scenes])


@pytest.fixture(scope="module")
def folders(right, tmp_path_factory):
    """`dense` draws the true scenes, `copy` the same, `noisy` with noise, `wrong` the next scene's picture."""
    root = tmp_path_factory.mktemp("candidates")
    noise = torch.randint(-60, 61, right.shape, generator=torch.Generator().manual_seed(0))
    sets = {
        "dense": right,
        "copy": right,
        "noisy": (right.int() + noise).clamp(0, 255).to(torch.uint8),
        "wrong": right.roll(-1, 0),
    }
    for name, images in sets.items():
        (root / name).mkdir()
        for index, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / name / f"{index:05d}.png")
    return {name: root / name for name in sets}


@pytest.fixture(scope="module")
def rows(folders, data):
    from genprune.miniature.grader import Grader

    torch.manual_seed(0)
    found = compare_images(
        folders,
        data,
        "dense",
        extractors=[FeatureExtractor(TinyNet(), "tiny"), ClipExtractor(*tiny_clip(), name="tiny-clip")],
        scene_scores=scene_grader(Grader().eval()),
        batch_size=4,
        resamples=200,
    )
    return {(row.candidate, row.metric): row for row in found}


def test_every_metric_of_every_candidate_and_control(rows):
    names = {"dense", "copy", "noisy", "wrong", "blank canvas", "mean image", "shuffled prompts"}
    assert {candidate for candidate, _ in rows} == names
    for metric in ("KID(tiny)", "FD(tiny)", "KID(tiny-clip)", "MMD-RBF(tiny-clip)"):
        assert {c for c, m in rows if m == metric} == names - {"shuffled prompts"}
        assert rows["dense", metric].floor.size == COUNT
    for metric in ("CLIPScore(tiny-clip)", "grade(all)", "grade(attributes)"):
        assert {c for c, m in rows if m == metric} == names
    assert {c for c, m in rows if m == "PSNR to dense (dB)"} == names - {"dense"}


def test_a_copy_differs_in_nothing(rows):
    assert rows["copy", "PSNR to dense (dB)"].value == 100
    assert rows["copy", "SSIM to dense"].value == pytest.approx(1)
    for (candidate, _), row in rows.items():
        if candidate == "copy" and row.difference is not None:
            assert row.difference.estimate == row.difference.low == row.difference.high == 0
    assert rows["copy", "FD(tiny)"].value == rows["dense", "FD(tiny)"].value


def test_distances_and_their_differences(rows):
    for metric in ("KID(tiny)", "FD(tiny)", "KID(tiny-clip)", "MMD-RBF(tiny-clip)"):
        assert rows["blank canvas", metric].value > rows["dense", metric].value
    assert rows["noisy", "KID(tiny)"].difference.estimate == pytest.approx(
        rows["noisy", "KID(tiny)"].value - rows["dense", "KID(tiny)"].value
    )
    assert 5 < rows["noisy", "PSNR to dense (dB)"].value < 25


def test_pairs_are_by_index(rows, right):
    expected = psnr(right.roll(-1, 0), right).mean().item()
    assert rows["wrong", "PSNR to dense (dB)"].value == pytest.approx(expected, rel=1e-9)
    # `wrong` draws exactly what the control makes of the reference
    for metric in ("PSNR to dense (dB)", "CLIPScore(tiny-clip)", "grade(attributes)"):
        assert rows["wrong", metric].value == rows["shuffled prompts", metric].value


def test_the_grade_is_the_graders(data, right):
    from genprune.miniature.grader import Grader, grade

    torch.manual_seed(0)
    grader = Grader().eval()
    scores = scene_grader(grader)(right, data.scenes)
    expected = grade(right, data.scenes, grader)
    assert scores["grade(all)"].mean().item() == pytest.approx(expected["all"])
    assert scores["grade(object)"].mean().item() == pytest.approx(expected["object"])
    assert scores["grade(background)"].mean().item() == pytest.approx(expected["background"])
    assert 0 < scores["grade(attributes)"].mean() < 1


def test_a_picture_that_shows_what_is_said_scores_one(data, right):
    """A grader that reads the truth: the share of attributes counts what the caption says, and no more."""
    from genprune.miniature.grader import ATTRIBUTES, labels

    truth = labels(data.scenes)

    class Oracle(torch.nn.Module):
        def __init__(self, knows):
            super().__init__()
            self.unused, self.knows = torch.nn.Parameter(torch.zeros(1)), knows

        def forward(self, images):
            return {
                name: torch.nn.functional.one_hot(
                    truth[name] if self.knows(name) else (truth[name] + 1) % len(ATTRIBUTES[name]),
                    len(ATTRIBUTES[name]),
                ).float()
                for name in truth
            }

    every = scene_grader(Oracle(lambda name: True))(right, data.scenes)
    assert all((values == 1).all() for values in every.values())
    no_background = scene_grader(Oracle(lambda name: name != "background"))(right, data.scenes)
    assert (no_background["grade(background)"] == 0).all() and (no_background["grade(all)"] == 0).all()
    assert (no_background["grade(object)"] == 1).all() and 0.5 < no_background["grade(attributes)"].mean() < 1


def test_grader_features_name_themselves(right):
    from genprune.miniature.grader import Grader

    extractor = grader_extractor(Grader().eval())
    assert extractor(right).shape == (COUNT, extractor.num_features)
    assert extractor.card.name == "miniature-grader"


def test_prompts_without_pictures_give_paired_metrics_only(folders, data):
    alone = dataclasses.replace(data, real=(), scenes=None)
    metrics = {row.metric for row in compare_images(folders, alone, "dense", controls=False, resamples=50)}
    assert metrics == {"PSNR to dense (dB)", "SSIM to dense"}
