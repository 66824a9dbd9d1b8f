"""PSNR, SSIM and latent MSE against numpy, and their means over batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from tiny_extractors import pictures

from genprune.metrics import BadImages, PairedFidelity, latent_mse, psnr, ssim


def noisy(images: torch.Tensor, level: int, seed: int = 9) -> torch.Tensor:
    noise = torch.randint(-level, level + 1, images.shape, generator=torch.Generator().manual_seed(seed))
    return (images.int() + noise).clamp(0, 255).to(torch.uint8)


def naive_psnr(x, y) -> float:
    x, y = x.numpy().astype(np.float64), y.numpy().astype(np.float64)
    return float(20 * np.log10(255 / np.sqrt(np.mean((x - y) ** 2))))


def naive_ssim(x, y) -> float:
    """Wang et al. 2004: 11 px Gaussian of sigma 1.5; torchmetrics mirrors the picture at its border."""
    taps = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    taps /= taps.sum()

    def blur(image):
        return correlate1d(correlate1d(image, taps, axis=-1, mode="mirror"), taps, axis=-2, mode="mirror")

    x, y = x.numpy() / 255.0, y.numpy() / 255.0
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float(np.mean((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))))


@pytest.mark.parametrize(("score", "naive"), [(psnr, naive_psnr), (ssim, naive_ssim)])
def test_equals_the_naive_formula_image_by_image(score, naive):
    x = pictures(4, 0)
    y = torch.stack([noisy(image, level) for image, level in zip(x, (2, 10, 40, 120), strict=True)])
    values = score(x, y)
    # torchmetrics builds its Gaussian window in the dtype of the pictures, so float64 throughout
    assert values.tolist() == pytest.approx([naive(a, b) for a, b in zip(x, y, strict=True)], abs=1e-6)
    assert values.diff().max() < 0  # more noise, lower score
    assert torch.equal(score(x.float() / 255, y), values)


def test_identical_pictures():
    x = pictures(2, 0)
    assert psnr(x, x).tolist() == [100, 100]
    assert ssim(x, x).tolist() == pytest.approx([1, 1], abs=1e-12)
    assert latent_mse(x.float(), x.float()).tolist() == [0, 0]


def test_latent_mse_of_any_shape():
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 4, 8, 8), (3, 16, 64)):
        x, y = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        expected = ((x.numpy().astype(np.float64) - y.numpy()) ** 2).reshape(3, -1).mean(1)
        assert latent_mse(x, y).tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    with pytest.raises(BadImages, match="NaN or infinity.*float32"):
        latent_mse(x, y / 0)


def test_means_over_uneven_batches():
    x, y = pictures(5, 0), noisy(pictures(5, 0), 30)
    for score, name, unit in ((psnr, "PSNR", "dB"), (ssim, "SSIM", "")):
        metric = PairedFidelity(score)
        metric.update(x[:4], y[:4])
        metric.update(x[4:], y[4:])
        result = metric.result()
        assert result.value == pytest.approx(score(x, y).mean().item(), rel=1e-12)
        assert (result.name, result.unit, result.count) == (name, unit, 5)
        metric.reset()
        with pytest.raises(BadImages, match="has seen no pictures"):
            metric.compute()


@pytest.mark.parametrize("score", [psnr, ssim, latent_mse])
def test_refuses_unpaired_batches(score):
    with pytest.raises(BadImages, match=r"shapes \(2, 3, 24, 24\) and \(3, 3, 24, 24\).*same prompts"):
        score(pictures(2, 0), pictures(3, 0))


def test_ssim_refuses_pictures_below_its_window():
    with pytest.raises(BadImages, match=r"\(6, 6\) px, expected at least 11"):
        ssim(pictures(1, 0, side=6), pictures(1, 1, side=6))
