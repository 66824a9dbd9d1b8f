"""Architecture codes: what an entry gates, in which order parts go, thresholds without noise, features."""

from __future__ import annotations

import copy

import pytest
import tiny_hosts
import torch

import genprune as gp
from genprune.errors import NoMatchingSites, PlanMismatch
from genprune.families import find_sites
from genprune.routers import relaxation
from genprune.routers.architecture import ArchitectureSpace

HOSTS = ("sd_unet", "sdxl_unet", "flux", "sd3", "dit", "pixart", "vit")


@pytest.fixture(scope="module", params=HOSTS)
def model(request):
    return getattr(tiny_hosts, request.param)()


def code_of(space, seed: int = 0) -> torch.Tensor:
    """Logits around the threshold."""
    generator = torch.Generator().manual_seed(seed)
    return relaxation.threshold(space.offset) + torch.randn(space.length, generator=generator)


def test_every_site_that_narrows_is_covered_once(model):
    space, sites = ArchitectureSpace.of(model), find_sites(model)
    named = [vector.site for vector in space.widths]
    several = [name for name, site in sites.items() if site.size > 1]
    assert sorted(named) == sorted(several)
    assert sum(space.lengths) == space.length
    assert all(vector.units == sites[vector.site].size for vector in space.widths)


def test_the_start_keeps_everything(model):
    space = ArchitectureSpace.of(model)
    assert all(mask.all() for mask in space.keep(space.start()).values())


def test_gates_are_hard_to_the_bit_and_have_a_gradient(model):
    space = ArchitectureSpace.of(model)
    logits = torch.stack([code_of(space, 1), code_of(space, 2)]).requires_grad_()
    noise = relaxation.gumbel(tuple(logits.shape), torch.Generator().manual_seed(3))
    gates = space.gates(logits, noise)
    assert all(set(value.unique().tolist()) <= {0.0, 1.0} for value in gates.values())
    sum(value.sum() for value in gates.values()).backward()
    assert (logits.grad != 0).float().mean() > 0.5


def test_a_code_is_one_architecture_whatever_the_seed(model):
    space = ArchitectureSpace.of(model)
    code = code_of(space)
    torch.manual_seed(1)
    first = space.keep(code)
    torch.manual_seed(2)
    again = space.keep(code)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_threshold_is_the_median_of_the_noise():
    assert relaxation.threshold(3.0) == pytest.approx(-3.3665, abs=1e-4)
    noise = relaxation.gumbel((200_000,), torch.Generator().manual_seed(0))
    kept = relaxation.relaxed(torch.tensor(relaxation.threshold(3.0)), noise, 0.4, 3.0) >= 0.5
    assert float(kept.float().mean()) == pytest.approx(0.5, abs=0.01)
    logit = torch.tensor(-2.5)
    kept = relaxation.relaxed(logit, noise, 0.4, 3.0) >= 0.5
    expected = 1 - torch.exp(-torch.exp(logit + 3))
    assert float(kept.float().mean()) == pytest.approx(float(expected), abs=0.01)


def test_an_empty_vector_keeps_the_entry_of_the_largest_logit():
    space = ArchitectureSpace.of(tiny_hosts.flux(), depth=False)
    logits = torch.full((space.length,), -20.0)
    for vector in space.widths:
        logits[vector.part] = torch.linspace(-30, -20, vector.entries)  # ascending: the last survives
    keep = space.keep(logits)
    for vector in space.widths:
        expected = space.entry_of[vector.site] == vector.entries - 1
        assert torch.equal(keep[vector.site], expected)


def test_depth_falls_in_order_and_the_first_never_goes():
    space = ArchitectureSpace.of(tiny_hosts.flux())
    assert len(space.depth) > 2
    for seed in range(5):
        logits = torch.randn(1, space.length, generator=torch.Generator().manual_seed(seed)) * 4
        kept = [bool(space.keep(logits[0])[name].all()) for name in space.depth]
        assert kept[0] and kept == sorted(kept, reverse=True)
    assert space.keep(space.start(), shift=-100.0)[space.depth[0]].all()
    probability = torch.sigmoid(relaxation.depth_logits(torch.zeros(1, 4)))
    assert torch.allclose(probability, torch.tensor([[1, 0.75, 0.5, 0.25]]), atol=1e-5)


def test_the_middle_of_the_network_goes_first():
    model = tiny_hosts.flux()
    space = ArchitectureSpace.of(model)
    joint, single = len(model.transformer_blocks), len(model.single_transformer_blocks)
    place = {f"transformer_blocks.{i}:block": i for i in range(joint)}
    place |= {f"single_transformer_blocks.{i}:block": joint + i for i in range(single)}
    middle = (len(space.depth) - 1) / 2
    called = [name for name in place if name in space.depth]
    distance = [abs(called.index(name) - middle) for name in space.depth]
    assert distance == sorted(distance, reverse=True)
    assert space.depth[0] == called[-1]


def test_depth_of_a_unet_is_its_resnets_and_transformers():
    space = ArchitectureSpace.of(tiny_hosts.sd_unet())
    kinds = {name.rsplit(":", 1)[1] for name in space.depth}
    assert kinds == {"branch", "wrapper"}
    assert all(find_sites(tiny_hosts.sd_unet())[name].parent is None for name in space.depth)


def test_units_of_like_score_go_together():
    model = tiny_hosts.flux()
    name = next(iter(find_sites(model).of_kind("neurons")))
    size = find_sites(model)[name].size
    scores = {name: torch.randn(size, generator=torch.Generator().manual_seed(0))}
    space = ArchitectureSpace.of(model, groups=4, scores=scores)
    groups = [scores[name][space.entry_of[name] == entry] for entry in range(4)]
    assert all(one.min() >= other.max() for one, other in zip(groups, groups[1:]))
    assert {len(group) for group in groups} <= {size // 4, size // 4 + 1}
    plain = ArchitectureSpace.of(model, groups=4).entry_of[name]
    assert torch.equal(plain, plain.sort().values)


def test_a_start_from_a_plan_is_that_plan():
    model = tiny_hosts.sd_unet()
    plan = gp.make_plan(model, gp.Magnitude(keep=0.7, of="macs"), progress=False)
    scores = gp.score(model, gp.Magnitude(), progress=False).values
    space = ArchitectureSpace.of(model, groups=10_000, scores=scores)  # every unit by itself
    keep = space.keep(space.start(plan.keep))
    for name, mask in plan.keep.items():
        assert torch.equal(keep[name], mask)
    assert all(mask.all() for name, mask in keep.items() if name not in plan.keep)


def test_features_are_normalised_and_count_depth():
    space = ArchitectureSpace.of(tiny_hosts.flux())
    code = code_of(space)
    features = space.features(code)
    assert features.dtype == torch.float64
    assert float(features.norm()) == pytest.approx(1)
    # where a block goes, what its own entries say does not count
    vector = next(v for v in space.widths if v.above and v.above[0] == len(space.depth) - 1)
    gone = code.clone()
    gone[space.depth_part] = torch.tensor([-30.0] + [0.0] * (len(space.depth) - 2) + [30.0])
    other = gone.clone()
    other[vector.part] += 3
    assert torch.allclose(space.features(gone), space.features(other), atol=1e-6)
    assert not torch.allclose(space.features(code), space.features(code + 1), atol=1e-3)


def test_json_round_trip_and_damage():
    space = ArchitectureSpace.of(tiny_hosts.sd_unet(), groups=5)
    again = ArchitectureSpace.from_json(space.to_json(), space.tensors())
    code = code_of(space)
    assert again.to_json() == space.to_json()
    one, other = space.keep(code), again.keep(code)
    assert all(torch.equal(one[name], other[name]) for name in one)
    tensors = dict(space.tensors())
    broken = copy.deepcopy(space.to_json())
    broken["widths"][0][1] += 1
    with pytest.raises(PlanMismatch, match="other widths"):
        ArchitectureSpace.from_json(broken, tensors)
    tensors.pop(space.widths[0].site)
    with pytest.raises(PlanMismatch, match="lacks a part"):
        ArchitectureSpace.from_json(space.to_json(), tensors)


def test_kinds_and_patterns_that_match_nothing_are_errors():
    model = tiny_hosts.sd_unet()
    with pytest.raises(NoMatchingSites, match="nosuch"):
        ArchitectureSpace.of(model, depth=("nosuch*",))
    with pytest.raises(NoMatchingSites, match="does not go as a whole"):
        ArchitectureSpace.of(model, depth=("*:heads",))
    with pytest.raises(NoMatchingSites, match="do not narrow"):
        ArchitectureSpace.of(model, kinds=("block",))
