"""Magnitude against a naive loop, and its scale laws."""

from __future__ import annotations

import pytest
import torch
from tiny_hosts import HOSTS, sd_unet

import genprune as gp
from genprune.criteria.magnitude import MagnitudeScores


def naive(model, site):
    """Entry by entry, in float64."""
    score, entries = [0.0] * site.size, 0
    for piece in site.slices:
        layer = model.get_submodule(piece.module)
        for tensor in (layer.weight, layer.bias) if piece.side == "out" else (layer.weight,):
            if tensor is None:
                continue
            tensor = tensor.detach().double()
            rows = [
                tensor[i] if piece.side == "out" else tensor[:, i] for i in range(tensor.shape[piece.side == "in"])
            ]
            owned = [rows[piece.offset + i] for i in range(site.size * piece.width)]
            mean_square = float(torch.stack(owned).square().mean())
            entries += owned[0].numel() * piece.width if mean_square else 0
            for unit in range(site.size):
                for i in range(piece.width):
                    if mean_square:
                        score[unit] += float(owned[unit * piece.width + i].square().sum()) / mean_square
    return (torch.tensor(score) / max(entries, 1)).sqrt()


@pytest.mark.parametrize("host", HOSTS)
def test_equals_the_naive_sum(host):
    model = HOSTS[host]()
    sites = gp.find_sites(model)
    scores = MagnitudeScores().scores(model, sites)
    for kind in sites.kinds():
        site = next(iter(sites.of_kind(kind).values()))
        if site.slices:
            torch.testing.assert_close(scores[site.name], naive(model, site), rtol=1e-4, atol=1e-5)


def test_scale_of_a_layer_does_not_matter_but_of_a_unit_does():
    model = sd_unet()
    sites = gp.find_sites(model)
    heads = next(iter(sites.of_kind("heads").values()))
    before = MagnitudeScores().scores(model, sites)[heads.name]
    query = model.get_submodule(heads.path).to_q
    with torch.no_grad():
        query.weight.mul_(7)
    torch.testing.assert_close(MagnitudeScores().scores(model, sites)[heads.name], before, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        query.weight[: query.out_features // heads.size].mul_(7)
    after = MagnitudeScores().scores(model, sites)[heads.name]
    assert after[0] > before[0] and (after[1:] < before[1:]).all()


def test_whole_sites_are_measured_against_their_own_kind():
    model = sd_unet()
    sites = gp.find_sites(model)
    blocks = list(sites.of_kind("block"))
    before = MagnitudeScores().scores(model, sites)
    with torch.no_grad():
        for parameter in model.get_submodule(sites[blocks[0]].path).parameters():
            parameter.mul_(3)
    after = MagnitudeScores().scores(model, sites)
    assert after[blocks[0]] > before[blocks[0]]
    assert all(after[name] < before[name] for name in blocks[1:])


def test_an_average_unit_scores_one_whatever_the_kind():
    model = sd_unet()
    sites = gp.find_sites(model)
    scores = MagnitudeScores().scores(model, sites)
    for name, site in sites.items():
        if site.slices:
            assert float(scores[name].square().mean()) == pytest.approx(1, rel=1e-4)
        else:
            assert 0.3 < float(scores[name]) < 3
