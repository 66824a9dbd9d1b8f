"""Budgets of codes: exact costs with gradients, the shift to the budget, plans that keep what they say."""

from __future__ import annotations

import copy

import pytest
import tiny_hosts
import torch

import genprune as gp
from genprune.costs import operating_point, site_costs
from genprune.cutting import plan_base
from genprune.errors import GenpruneError
from genprune.routers import relaxation
from genprune.routers.architecture import ArchitectureSpace
from genprune.routers.codes import budget_shift, code_plans, shares_of, usage_of
from genprune.routers.resources import CodeCosts
from genprune.routers.timing import module_times, timed_costs

HOSTS = ("sd_unet", "sdxl_unet", "flux", "sd3", "dit", "vit")


def codes_of(space, count: int, spread: float = 1.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    codes = relaxation.threshold(space.offset) + spread * torch.randn((count, space.length), generator=generator)
    codes[:, space.depth_part] = torch.randn((count, len(space.depth)), generator=generator) * 3
    return codes


@pytest.mark.parametrize("of", ["macs", "params"])
@pytest.mark.parametrize("host", HOSTS)
def test_shares_are_those_of_the_cut_model(host, of):
    model = getattr(tiny_hosts, host)()
    space, costs = ArchitectureSpace.of(model, groups=8), site_costs(model)
    codes = codes_of(space, 3)
    shares = CodeCosts(costs, space, of).share(space.gates(codes)).tolist()
    point = {k: v for k, v in vars(operating_point(model)).items()}
    dense = getattr(gp.count_costs(model, **point), of)
    for code, share in zip(codes, shares):
        plan = gp.PruningPlan(plan_base(model), space.keep(code))
        small = gp.cut(copy.deepcopy(model), plan)
        assert share == pytest.approx(getattr(gp.count_costs(small, **point), of) / dense, rel=2e-3)
        assert share < 0.98


def test_cross_attention_counts_its_own_context():
    """APTP's counter took queries squared: text then costs up to a hundred times what it does."""
    model = tiny_hosts.sd_unet()
    space = ArchitectureSpace.of(model, kinds=("heads",), depth=False)
    name = next(v.site for v in space.widths if "attn2" in v.site)
    saved = []
    for text in (4, 64):
        costs = site_costs(model, operating_point(model, text_length=text))
        gates = {v.site: torch.ones(1, v.units) for v in space.widths}
        gates[name] = torch.tensor([[0.0] + [1.0] * (len(gates[name][0]) - 1)])
        saved.append(float(1 - CodeCosts(costs, space).share(gates)) * costs.total.macs)
    assert saved[1] > saved[0] * 1.5


def test_gradients_say_which_units_cost_more():
    model = tiny_hosts.flux()
    space = ArchitectureSpace.of(model)
    costs = CodeCosts(site_costs(model), space)
    logits = codes_of(space, 1).requires_grad_()
    costs.share(space.gates(logits)).sum().backward()
    assert torch.isfinite(logits.grad).all() and (logits.grad[:, : space.depth_part.start] >= 0).all()
    assert (logits.grad > 0).any()


def test_the_target_is_of_what_can_go():
    model = tiny_hosts.sd_unet()
    space, costs = ArchitectureSpace.of(model), site_costs(model)
    counted = CodeCosts(costs, space)
    least = {v.site: torch.zeros(1, v.units) for v in space.widths}
    for gate in least.values():
        gate[:, 0] = 1
    least |= {name: torch.zeros(1, 1) for name in space.depth}
    least[space.depth[0]][:] = 1
    assert float(counted.share(least)) == pytest.approx(counted.least, abs=1e-3)
    keep = 0.7
    assert counted.prunable_target(keep) * (1 - counted.least) + counted.least == pytest.approx(keep)
    with pytest.raises(GenpruneError, match="no code of this space"):
        counted.prunable_target(counted.least * 0.9)


def test_the_shift_meets_the_budget_over_the_routed_prompts():
    model = tiny_hosts.flux()
    space, costs = ArchitectureSpace.of(model, groups=32), site_costs(model)
    codes, usage = codes_of(space, 3), [0.6, 0.3, 0.1]
    codes[:, space.depth_part] = space.start()[space.depth_part]
    shift = budget_shift(space, codes, usage, costs, 0.8, "macs")
    shares = shares_of(space, codes, costs, "macs", shift)
    assert sum(u * s for u, s in zip(usage, shares)) == pytest.approx(0.8, abs=0.02)  # the tiny model has few units
    assert len(set(shares)) == 3


def test_plans_hold_their_own_figures(caplog):
    model = tiny_hosts.sd_unet()
    space, costs = ArchitectureSpace.of(model), site_costs(model)
    codes = codes_of(space, 2)
    shares = shares_of(space, codes, costs, "macs")
    plans = code_plans(
        space, codes, costs, plan_base(model), 0.0, {"method": "aptp"}, {"keep": 0.7, "of": "macs"}, shares
    )
    for index, plan in enumerate(plans):
        small = gp.cut(copy.deepcopy(model), plan)
        found = gp.count_costs(small, **plan.operating_point)
        assert (found.macs, found.params) == (plan.figures["macs"], plan.figures["params"])
        assert plan.made_by["expert"] == index
        assert plan.made_by["budget"]["reached"] == pytest.approx(found.macs / plan.figures["dense_macs"])


def test_what_noise_draws_is_what_stays_once_codes_are_decided():
    """The gap between drawn architectures and the final one: there while logits are near the threshold, then gone."""
    model = tiny_hosts.flux()
    space = ArchitectureSpace.of(model, depth=False)
    costs, codes = CodeCosts(site_costs(model), space), codes_of(space, 2, spread=0.5)
    noise = relaxation.gumbel(tuple(codes.shape), torch.Generator().manual_seed(1))
    decided = relaxation.threshold(3.0) + 60 * (codes - relaxation.threshold(3.0))
    gaps = [
        float((costs.share(space.gates(each, noise)) - costs.share(space.gates(each))).abs().mean())
        for each in (codes, decided)
    ]
    assert gaps[0] > 0.02 and gaps[1] < gaps[0] / 5


def test_measured_times_stand_where_macs_do():
    model = tiny_hosts.sd_unet().eval()
    space, costs = ArchitectureSpace.of(model), site_costs(model)
    times = module_times(model, costs, rounds=2)
    timed = timed_costs(model, costs, times)
    assert timed.total.macs == sum(times.values()) > 0 and timed.total.params == costs.total.params
    codes = codes_of(space, 2)
    predicted = shares_of(space, codes, timed, "macs")
    assert CodeCosts(timed, space).share(space.gates(codes)).tolist() == pytest.approx(predicted, rel=2e-3)
    # a layer's own time and no other's: the halves of the network add up
    assert timed.total.within("down_blocks").macs + timed.total.within("up_blocks").macs < timed.total.macs


def test_usage_counts_prompts():
    assert usage_of([0, 2, 2, 0], 3) == [0.5, 0.0, 0.5]
