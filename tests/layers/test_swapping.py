"""Swapping: what stands in computes what a cut leaves, and the originals come back whatever happens."""

from __future__ import annotations

import re

import pytest
import torch
from families.family_cases import CASE_NAMES, dense_run, difference, run
from torch import nn

import genprune as gp
from genprune.errors import GenpruneError, NoMatchingSites
from genprune.gates import attach_gates
from genprune.layers.swapping import removal, swapped

REMOVABLE = ("branch", "block", "wrapper")
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


def removable(sites):
    return [site for site in sites.values() if site.kind in REMOVABLE]


def snapshot(model):
    """Every module by path, identity and order included, with its mode and hooks, and the tensors."""
    modules = [
        (path, id(module), module.training, list(module._forward_hooks), list(module._forward_pre_hooks))
        for path, module in model.named_modules(remove_duplicate=False)
    ]
    return modules, [(name, id(tensor), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()]


@pytest.mark.parametrize("name", CASE_NAMES)
def test_a_removal_swapped_in_computes_what_the_cut_model_computes(name):
    dense = dense_run(name)
    model = dense.copy()
    before = snapshot(model)
    sites = removable(dense.sites)
    for site in sites[:: 1 if len(sites) <= 12 else 3]:  # 28 cuts of a U-Net take long
        cut = gp.cut(dense.copy(), dense.plan({site.name: torch.zeros(site.size, dtype=torch.bool)}))
        with torch.no_grad():
            with swapped(model, removal(model, site)):
                found = run(model, dense.inputs)
            assert difference(run(cut, dense.inputs), found) <= 1e-6, site.name  # the same kernels
        assert difference(dense.output, found) >= 1e-4, site.name
    assert snapshot(model) == before
    with torch.no_grad():
        assert torch.equal(run(model, dense.inputs), dense.output)


def test_the_originals_come_back_after_an_error():
    dense = dense_run("unet")
    model = dense.copy().train()
    model.mid_block.eval()
    sites = dense.sites
    with attach_gates(model, {name: torch.ones(site.size) for name, site in sites.of_kind("heads").items()}):
        before = snapshot(model)
        stand_ins = {path: m for site in removable(sites)[:5] for path, m in removal(model, site).items()}
        with pytest.raises(RuntimeError, match="midway"):
            with swapped(model, stand_ins):
                assert snapshot(model) != before
                raise RuntimeError("midway")
        assert snapshot(model) == before


def test_stand_ins_take_the_mode_of_the_original_and_leave_shared_modules_alone():
    model = dense_run("unet").copy()
    path = "up_blocks.0.resnets.0"
    resnet = model.get_submodule(path).train()
    resnet.conv_shortcut.eval()
    stand_in = removal(model, gp.find_sites(model)[f"{path}:branch"])[path].eval()
    with swapped(model, {path: stand_in}):
        assert stand_in.training
        assert stand_in.conv_shortcut is resnet.conv_shortcut and not resnet.conv_shortcut.training


def test_a_path_inside_another_has_no_effect():
    dense = dense_run("unet")
    model = dense.copy()
    inner = removal(model, dense.sites[f"{BLOCK}.attn1:branch"])
    outer = removal(model, dense.sites[f"{BLOCK}:block"])
    results = []
    for changes in (outer, inner | outer, outer | inner):
        before = snapshot(model)
        with swapped(model, changes), torch.no_grad():
            results.append(run(model, dense.inputs))
        assert snapshot(model) == before
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("path", [f"{BLOCK}.attn3", "", "nowhere.at.all", f"{BLOCK}.attn1.to_q.weight"])
def test_an_unknown_path_is_refused_before_anything_changes(path):
    model = dense_run("unet").copy()
    before = snapshot(model)
    with pytest.raises(GenpruneError, match=rf"'{re.escape(path)}' is no module inside this .*expected.*List them"):
        with swapped(model, {f"{BLOCK}.attn1": nn.Identity(), path: nn.Identity()}):
            raise AssertionError("swapped")
    assert snapshot(model) == before


def test_removal_names_the_layers_that_would_have_to_be_narrowed():
    dense = dense_run("flux")
    site = dense.sites["single_transformer_blocks.0.proj_mlp:neurons"]
    with pytest.raises(NoMatchingSites, match=r"narrows 'single.*expected a layer that leaves as a whole.*of_kind"):
        removal(dense.model, site)
