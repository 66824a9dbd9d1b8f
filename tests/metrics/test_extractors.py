"""Extractors own dtype, range, size and name of what they see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_extractors import TinyNet, pictures
from torch import nn

from genprune.metrics import BadImages, FeatureExtractor, as_extractor, extract, timm_extractor, to_uint8, weights_hash
from genprune.metrics.images import resize


def test_uint8_and_float_give_the_same_features_bit_for_bit():
    extractor, images = as_extractor(TinyNet()), pictures(3, 0)
    assert torch.equal(extractor(images), extractor(images.float() / 255))
    assert not torch.equal(extractor(images), extractor(255 - images))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8), r"shape \(3, 8, 8\), expected \(batch, 3, height, width\)"),
        (torch.zeros(1, 1, 8, 8), "convert to RGB"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "dtype torch.int64, expected uint8 or floats"),
        (torch.full((1, 3, 8, 8), -1.0), r"reach from -1 to -1, expected \[0, 1\].*\(images \+ 1\) / 2"),
        (torch.full((1, 3, 8, 8), 255.0), r"reach from 255 to 255.*images / 255"),
        (torch.full((1, 3, 8, 8), float("nan")), "reach from nan to nan"),
    ],
)
def test_refuses_what_is_no_image_batch(images, message):
    with pytest.raises(BadImages, match=message):
        as_extractor(TinyNet())(images)


def test_rounds_floats_to_the_nearest_level():
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 4, 256)
    assert torch.equal(to_uint8(levels.float() / 255), levels)
    assert to_uint8(torch.full((1, 3, 1, 1), 0.5 / 255 + 1e-4)).max() == 1


@pytest.mark.parametrize("sizes", [(64, 20), (20, 64), (30, 30)])
def test_resize_is_pils_antialiased_bicubic(sizes):
    before, after = sizes
    image = torch.rand(1, 3, before, before, generator=torch.Generator().manual_seed(0))
    channels = [Image.fromarray(image[0, c].numpy(), mode="F").resize((after, after), Image.BICUBIC) for c in range(3)]
    expected = torch.from_numpy(np.stack([np.array(channel) for channel in channels]))
    assert torch.allclose(resize(image, after)[0], expected, atol=2e-5)  # float32 filters summed in another order


def test_resizes_and_normalises_before_the_network():
    class Sees(nn.Module):
        num_features = 3

        def forward(self, images):
            assert images.shape[-2:] == (10, 10)
            return images.mean(dim=(2, 3))

    extractor = FeatureExtractor(Sees(), "sees", image_size=10, mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))
    gray = torch.full((2, 3, 30, 30), 51, dtype=torch.uint8)  # 0.2
    expected = torch.tensor([(0.2 - 0.5) / 0.5, 0.2 - 0.25, 0.1], dtype=torch.float64).expand(2, 3)
    assert torch.allclose(extractor(gray), expected, atol=1e-6)
    assert extractor(gray).dtype == torch.float64
    assert extractor.card.resize == "bicubic-antialias"


def test_stays_in_eval_mode_and_takes_no_gradients():
    net = nn.Sequential(TinyNet(), nn.Dropout(0.5))
    net.num_features = 12
    extractor = as_extractor(net).train()
    assert torch.equal(extractor(pictures(4, 0)), extractor(pictures(4, 0)))
    assert not extractor(pictures(1, 0)).requires_grad


def test_the_hash_is_of_the_weights():
    assert weights_hash(TinyNet(0)) == weights_hash(TinyNet(0))
    assert weights_hash(TinyNet(0)) != weights_hash(TinyNet(1))
    assert as_extractor(TinyNet(0)).card.weights_hash.startswith("sha256:")
    half = TinyNet(0).half()
    assert weights_hash(half) != weights_hash(TinyNet(0))
    assert weights_hash(TinyNet(0).to(torch.bfloat16)) != weights_hash(half)


def test_a_substitute_cannot_take_a_standard_name():
    with pytest.raises(BadImages, match="'inception-v3' is reserved"):
        FeatureExtractor(TinyNet(), "inception-v3")


def test_says_what_is_missing():
    with pytest.raises(BadImages, match=r"Linear has no attribute num_features.*num_features=\.\.\."):
        as_extractor(nn.Linear(2, 2))
    with pytest.raises(BadImages, match="the extractor is a function, expected a torch.nn.Module"):
        as_extractor(lambda images: images)
    unpooled = FeatureExtractor(nn.Conv2d(3, 12, 5), "unpooled", num_features=12)
    with pytest.raises(BadImages, match=r"returned features of shape \(2, 4800\) for 2 images, expected \(2, 12\)"):
        unpooled(pictures(2, 0))
    with pytest.raises(BadImages, match="there are no images"):
        extract(as_extractor(TinyNet()), [])


def test_a_timm_model_brings_its_own_preprocessing():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False)
    extractor = timm_extractor(model, "tiny-vit")
    images = pictures(2, 0)
    config = timm.data.resolve_model_data_config(model)
    prepared = resize(images.float() / 255, config["input_size"][-1])
    prepared = (prepared - torch.tensor(config["mean"]).view(3, 1, 1)) / torch.tensor(config["std"]).view(3, 1, 1)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(prepared), pre_logits=True)
    assert torch.allclose(extractor(images).float(), expected, atol=1e-5)
    assert extractor.num_features == expected.shape[1]
