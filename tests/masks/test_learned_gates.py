"""Gates of a denoising step: replayed, independent of order, open to the bit, and gone afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from mask_cases import OPTIONS, learned_gates
from tiny_pipelines import flux_pipeline

from genprune.denoising import draw_latents
from genprune.families import denoiser, find_sites
from genprune.gates import gated_sites
from genprune.masks import HardConcrete, MaskLogits
from genprune.masks.step_gates import LearnedGates
from genprune.sites import Sites


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def draw(pipe, options, gates=None):
    prompts = ["a cat", "two dogs"]
    return draw_latents(pipe, prompts, seeds=(3, 4), gates=gates, num_inference_steps=2, **options)


def test_pitfall_6_a_step_set_again_has_the_same_gates(dit):
    with learned_gates(dit) as gates:
        gates.draw = 3
        gates.set_step(1)
        first = [value.detach().clone() for value in gates._handle.values()]
        gates.set_step(2)
        torch.rand(7)  # the global generator has no part in it
        gates.set_step(1)
        assert all(torch.equal(a, b) for a, b in zip(first, gates._handle.values()))
        assert all(value.requires_grad and value.dtype == torch.float32 for value in gates._handle.values())


def test_every_step_draw_seed_and_site_has_noise_of_its_own(dit):
    found = {}
    for seed in (0, 1):
        gates = learned_gates(dit, seed=seed)
        for gates.draw in (0, 1, 2):
            for step in (0, 1, 2):
                found[seed, gates.draw, step] = torch.cat(list(gates.noise(step).values()))
    flat = torch.stack(list(found.values()))
    assert float(flat.min()) >= 0 and float(flat.max()) < 1
    together = torch.corrcoef(flat) - torch.eye(len(flat))
    assert float(together.abs().max()) < 0.25  # 328 uniforms: 1 / sqrt(328) = 0.055 is one standard error
    noise = gates.noise(0)
    assert len({float(values[0]) for values in noise.values()}) == len(noise)


def test_pitfall_10_noise_does_not_depend_on_the_order_of_modules(dit):
    sites = find_sites(denoiser(dit))
    backwards = Sites.of(sites.host, reversed([sites[name] for name in sites]))
    one, other = (
        LearnedGates(denoiser(dit), order, MaskLogits.filled(order, 1.0), HardConcrete(), seed=2)
        for order in (sites, backwards)
    )
    assert same(one.noise(4), other.noise(4)) and list(one.logits) == sorted(sites)


def test_open_gates_are_the_dense_model_to_the_bit(sd, flux):
    for pipe, options in ((sd, OPTIONS["sd"]), (flux, OPTIONS["flux"])):
        dense = draw(pipe, options)
        with learned_gates(pipe) as gates, torch.no_grad():
            gates.set_step(0)
            gates.open()
            assert torch.equal(draw(pipe, options), dense)
            assert not torch.equal(draw(pipe, options, gates), dense)
            gates.open()
            assert torch.equal(draw(pipe, options), dense)


def test_pitfall_10_a_bfloat16_model_has_float32_logits_and_bfloat16_latents(tmp_path):
    pipe = flux_pipeline(tmp_path).to(torch.bfloat16)
    dense = draw(pipe, OPTIONS["flux"])
    with learned_gates(pipe) as gates:
        gates.open()
        with torch.no_grad():
            assert torch.equal(draw(pipe, OPTIONS["flux"]), dense)
        latents = draw(pipe, OPTIONS["flux"], gates)
        assert latents.dtype == torch.bfloat16
        found = torch.autograd.grad(latents.float().square().mean(), gates.parameters())
    assert all(g.dtype == torch.float32 for g in found) and any(bool(g.any()) for g in found)
    assert all(values.dtype == torch.float32 for values in gates.parameters())


def test_fixed_gates_are_the_plans(dit):
    with learned_gates(dit) as gates:
        names = list(gates.logits)
        mask = torch.arange(len(gates.logits[names[0]])) % 2 == 0
        gates.set_step(0)
        gates.fix({names[0]: mask})
        assert torch.equal(gates._handle[names[0]], mask.float())
        assert all(bool((gates._handle[name] == 1).all()) for name in names[1:])
        assert not any(value.requires_grad for value in gates._handle.values())


def test_gates_are_gone_afterwards_also_after_an_error(dit):
    model = denoiser(dit)
    with learned_gates(dit) as gates:
        assert sorted(gated_sites(model)) == list(gates.logits)
    assert not gated_sites(model)
    with pytest.raises(KeyboardInterrupt), learned_gates(dit):
        raise KeyboardInterrupt
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_pitfall_16_a_layer_called_twice_keeps_its_gate(sd):
    """Gates belong to module names, not to the order of calls."""
    model = copy.deepcopy(denoiser(sd))
    sites = find_sites(model)
    name = next(name for name, site in sites.items() if site.kind == "neurons")
    feed_forward = model.get_submodule(sites[name].path)
    hidden = torch.randn(1, 3, feed_forward.net[2].out_features)
    mask = torch.arange(sites[name].size) % 2 == 0
    gates = LearnedGates(model, sites, MaskLogits.filled(sites.of_kind("neurons", "heads"), 1.0), HardConcrete())
    with gates, torch.no_grad():
        gates.fix({name: mask})
        once, twice = feed_forward(hidden), feed_forward(hidden)
        gates.open()
        dense = feed_forward(hidden)
    assert torch.equal(once, twice) and not torch.equal(once, dense)
