"""CLIP embeddings, CLIP score and CMMD on a tiny open_clip model with random weights and the real tokenizer."""

from __future__ import annotations

import pytest
import torch
from tiny_extractors import TinyNet, pictures, tiny_clip

from genprune.metrics import (
    CMMD,
    BadImages,
    ClipExtractor,
    CLIPScore,
    MissingWeights,
    clip_scores,
    open_clip_extractor,
)

CAPTIONS = ["a cat on the left", "two dogs", "a red car", "three green frogs"]


@pytest.fixture(scope="module")
def clip():
    pytest.importorskip("open_clip")
    return ClipExtractor(*tiny_clip(), name="tiny-clip")


def test_score_equals_the_naive_formula(clip):
    images = pictures(4, 0)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # OpenAI's, as published
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    expected = []
    with torch.no_grad():
        for image, caption in zip(images, CAPTIONS, strict=True):
            left = clip.model.encode_image(((image.float() / 255 - mean) / std)[None])[0]
            right = clip.model.encode_text(clip.tokenizer([caption]))[0]
            expected.append(100 * max(float(left @ right / left.norm() / right.norm()), 0))
    metric = CLIPScore(clip)
    values = metric.scores(images, CAPTIONS)
    assert values.tolist() == pytest.approx(expected, abs=1e-4)  # the towers run in float32
    assert len(set(expected)) > 1
    metric.update(images[:1], CAPTIONS[:1])
    metric.update(images[1:].float() / 255, CAPTIONS[1:])
    result = metric.result()
    assert result.value == pytest.approx(sum(expected) / 4, abs=1e-4)
    assert (result.name, result.count, result.extractor.name) == ("CLIPScore(tiny-clip)", 4, "tiny-clip")


def test_scores_of_known_embeddings():
    images = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, -3.0], [0.0, 0.5]])
    texts = torch.tensor([[2.0, 0.0], [5.0, 0.0], [0.0, 1.0], [7.0, 0.0]])
    # parallel, 45 degrees, opposite (clamped), perpendicular; lengths do not matter
    assert clip_scores(images, texts).tolist() == pytest.approx([100, 100 / 2**0.5, 0, 0])


def test_captions_go_with_their_images(clip):
    images = pictures(4, 0)
    metric = CLIPScore(clip)
    straight, turned = metric.scores(images, CAPTIONS), metric.scores(images.flip(0), CAPTIONS[::-1])
    assert torch.allclose(straight, turned.flip(0), atol=1e-5)
    assert not torch.allclose(straight, metric.scores(images, CAPTIONS[::-1]), atol=1e-5)


def test_embeddings_have_unit_length_and_cmmd_takes_them(clip):
    assert torch.allclose(clip(pictures(3, 0)).norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(clip.embed_texts(CAPTIONS).norm(dim=1), torch.ones(4, dtype=torch.float64))
    metric = CMMD(clip)
    metric.update(pictures(6, 0), real=True)
    metric.update(pictures(6, 0), real=False)
    assert metric.result().value == pytest.approx(0, abs=1e-9)
    assert metric.name == "MMD-RBF(tiny-clip)"  # not the standard weights, so not CMMD


def test_errors(clip):
    with pytest.raises(BadImages, match=r"\(4, 16\) and \(3, 16\).*one caption per image"):
        CLIPScore(clip).update(pictures(4, 0), CAPTIONS[:3])
    with pytest.raises(BadImages, match="captions is one string"):
        CLIPScore(clip).update(pictures(1, 0), "a cat")
    with pytest.raises(BadImages, match="has seen no images"):
        CLIPScore(clip).compute()
    with pytest.raises(BadImages, match="'TinyNet' cannot embed captions, expected a ClipExtractor"):
        CLIPScore(TinyNet())
    with pytest.raises(MissingWeights, match="'nobody' of 'no-such-clip' could not be loaded.*ClipExtractor"):
        open_clip_extractor("no-such-clip", "nobody")
