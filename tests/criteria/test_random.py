"""Random scores: reproducible, and independent of what else is scored."""

from __future__ import annotations

import torch
from tiny_hosts import sd_unet

import genprune as gp
from genprune.criteria.random import RandomScores


def test_depends_on_seed_and_site_name_only():
    model = sd_unet()
    sites = gp.find_sites(model)
    all_of_them = RandomScores(3).scores(model, sites)
    heads = RandomScores(3).scores(model, sites.of_kind("heads"))
    other = RandomScores(4).scores(model, sites.of_kind("heads"))
    for name, values in heads.items():
        assert torch.equal(values, all_of_them[name])
        assert not torch.equal(values, other[name])
    assert len({tuple(v.tolist()) for v in all_of_them.values()}) == len(sites)
