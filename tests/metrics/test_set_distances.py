"""Frechet, kernel and CLIP-kernel distances against naive formulas in numpy and scipy, float64."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from tiny_extractors import TinyNet, pictures
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from genprune.metrics import (
    CMMD,
    FID,
    KID,
    BadImages,
    as_extractor,
    cmmd_distance,
    extract,
    frechet_distance,
    kernel_distance,
    kernel_influences,
    real_floor,
)

DISTANCES = {"frechet": frechet_distance, "kernel": kernel_distance, "cmmd": cmmd_distance}


def features(count: int, width: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mix / width**0.5 + shift


def naive_frechet(x, y) -> float:
    x, y = x.numpy(), y.numpy()
    root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T))
    gap = x.mean(0) - y.mean(0)
    return float(gap @ gap + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * np.real(root)))


def naive_kernel(x, y) -> float:
    def kernel(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    x, y = x.numpy(), y.numpy()
    within = [np.mean([kernel(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j]) for s in (x, y)]
    return float(within[0] + within[1] - 2 * np.mean([kernel(a, b) for a in x for b in y]))


def naive_cmmd(x, y) -> float:
    def mean_kernel(a, b):
        return np.mean([[np.exp(-np.sum((p - q) ** 2) / 200) for q in b] for p in a])

    x, y = x.numpy(), y.numpy()
    return float(1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)))


NAIVE = {"frechet": naive_frechet, "kernel": naive_kernel, "cmmd": naive_cmmd}


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("counts", [(40, 31), (31, 40)])
def test_equals_the_naive_formula(name, counts):
    x, y = features(counts[0], 6, 0), features(counts[1], 6, 1, shift=0.7)
    expected = NAIVE[name](x, y)
    assert expected > 0.1
    # sqrtm of a nonsymmetric product is good to about 1e-9; the sums differ in the last digits only
    assert DISTANCES[name](x, y).item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("counts", [(5, 9), (9, 5), (5, 30)])
def test_frechet_with_fewer_images_than_features(counts):
    # singular covariances: compare with the moments of the same data, regularised towards zero
    x, y = features(counts[0], 12, 0), features(counts[1], 12, 1, shift=0.5)
    regular = [np.cov(s.numpy().T) + 1e-12 * np.eye(12) for s in (x, y)]
    gap = (x.mean(0) - y.mean(0)).numpy()
    expected = gap @ gap + np.trace(regular[0] + regular[1] - 2 * np.real(scipy.linalg.sqrtm(regular[0] @ regular[1])))
    # the square root turns 1e-12 on 12 directions into about 1e-5
    assert frechet_distance(x, y).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("count", [4, 50])
def test_same_set_scores_zero(name, count):
    x = features(count, 8, 3)
    value = DISTANCES[name](x, x).item()
    if name == "kernel":  # unbiased, so a set against itself is a little below 0, by its missing diagonal
        diagonal = ((x.square().sum(1) / 8 + 1) ** 3).mean().item()
        assert -2 * diagonal / (count - 1) <= value <= 0
    else:
        assert abs(value) < 1e-9


@pytest.mark.parametrize("name", DISTANCES)
def test_order_of_images_and_block_size_do_not_matter(name):
    x, y = features(30, 5, 0), features(25, 5, 1, shift=0.4)
    value = DISTANCES[name](x, y).item()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    assert DISTANCES[name](x[order], y.flip(0)).item() == pytest.approx(value, rel=1e-10)
    if name != "frechet":
        assert DISTANCES[name](x, y, chunk=7).item() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("name", DISTANCES)
def test_refuses_what_has_no_distance(name):
    x = features(4, 5, 0)
    with pytest.raises(BadImages, match=r"shapes \(4, 5\) and \(4, 3\).*same extractor"):
        DISTANCES[name](x, x[:, :3])
    with pytest.raises(BadImages, match="at least 2 images on each side, got 4 and 1"):
        DISTANCES[name](x, x[:1])
    with pytest.raises(BadImages, match="NaN or infinity"):
        DISTANCES[name](x, x / 0)


def test_influences_average_to_the_distance_and_predict_leaving_one_out():
    x, y = features(60, 5, 0), features(60, 5, 1, shift=0.4)
    influences = kernel_influences(x, y)
    value = kernel_distance(x, y)
    assert influences.shape == (60,)
    assert influences.mean().item() == pytest.approx(value.item(), rel=1e-12)
    # leaving image i out moves the distance by -(influence_i - mean) / (n - 1), to first order
    left_out = torch.stack([kernel_distance(torch.cat([x[:i], x[i + 1 :]]), y) - value for i in range(60)])
    predicted = -(influences - value) / 59
    assert (left_out - predicted).norm() < 0.05 * predicted.norm()  # the rest is of second order, about 1 / n


METRICS = {"FID": FID, "KID": KID, "CMMD": CMMD}
NAMES = {"FID": "FD(TinyNet)", "KID": "KID(TinyNet)", "CMMD": "MMD-RBF(TinyNet)"}
FUNCTIONS = {"FID": frechet_distance, "KID": kernel_distance, "CMMD": cmmd_distance}


@pytest.mark.parametrize("name", METRICS)
def test_metric_equals_the_function_on_all_features_whatever_the_batches(name):
    net, real, fake = TinyNet(), pictures(20, 0), pictures(14, 1, high=150)
    metric = METRICS[name](net)
    for batch in real.split(7):
        metric.update(batch, real=True)
    for batch in fake.flip(0).split(3):
        metric.update(batch, real=False)
    extractor = as_extractor(net)
    expected = FUNCTIONS[name](extract(extractor, fake), extract(extractor, real)).item()
    result = metric.result()
    # running sums and a covariance from them lose a few digits against the two-pass formula
    assert result.value == pytest.approx(expected, rel=1e-6)
    assert result.value > 1e-4
    assert (result.name, result.count) == (NAMES[name], 14)
    assert result.extractor.weights_hash == extractor.card.weights_hash
    assert NAMES[name] in str(result)
    metric.reset()
    with pytest.raises(BadImages, match="has seen (no|0) .* images, expected at least 2. Call update"):
        metric.compute()


def test_fid_equals_torchmetrics():
    net, real, fake = TinyNet(), pictures(30, 0), pictures(30, 1, high=150)
    ours, theirs = FID(net), FrechetInceptionDistance(feature=as_extractor(net))
    for metric in (ours, theirs):
        metric.update(real, real=True)
        metric.update(fake, real=False)
    # theirs takes eigenvalues of a nonsymmetric product
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), rel=1e-5)


def test_kid_with_subsets_is_torchmetrics_seeded_and_leaves_the_random_state_alone():
    net, real, fake = TinyNet(), pictures(30, 0), pictures(30, 1, high=150)
    ours = KID(net, subsets=4, subset_size=10, seed=5)
    theirs = KernelInceptionDistance(feature=as_extractor(net), subsets=4, subset_size=10)
    for metric in (ours, theirs):
        metric.update(real, real=True)
        metric.update(fake, real=False)
    torch.manual_seed(5)
    expected = theirs.compute()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(torch.stack(ours.compute()), torch.stack(expected))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(BadImages, match="subset_size is 50.*30 real, 30 generated.*subsets=None"):
        large = KID(net, subsets=2, subset_size=50)
        large.update(real, real=True)
        large.update(fake, real=False)
        large.compute()


@pytest.mark.parametrize("name", METRICS)
def test_uint8_and_float_pictures_give_the_same_value(name):
    net, real, fake = TinyNet(), pictures(12, 0), pictures(12, 1, high=150)
    values = []
    for convert in (lambda x: x, lambda x: x.float() / 255, lambda x: x.double() / 255):
        metric = METRICS[name](net)
        metric.update(convert(real), real=True)
        metric.update(convert(fake), real=False)
        values.append(metric.result().value)
    assert values[0] == values[1] == values[2] != 0


def test_floor_is_below_a_real_difference_and_falls_with_size():
    real, other = features(200, 6, 0), features(100, 6, 0, shift=0.5)
    floor = real_floor(real, frechet_distance, size=100)
    assert (floor.size, floor.splits) == (100, 5)
    assert 0 < floor.low <= floor.mean <= floor.high < frechet_distance(other, real).item()
    assert real_floor(real, frechet_distance, size=20).mean > 2 * floor.mean
    assert real_floor(real, frechet_distance, size=100) == floor
    assert real_floor(real, frechet_distance, size=100, seed=1) != floor
    assert abs(real_floor(real, kernel_distance).mean) < 0.1 * kernel_distance(other, real).item()
    with pytest.raises(BadImages, match="there are 10. Pass more real images"):
        real_floor(real[:10], frechet_distance, size=6)


def test_floor_parts_do_not_overlap():
    real = torch.arange(20.0)[:, None]
    seen = []
    real_floor(
        real, lambda x, y: seen.append(set(x.flatten().tolist()) & set(y.flatten().tolist())) or torch.zeros(())
    )
    assert seen == [set()] * 5
