"""The expected share is what the plan costs, and the price brings it to the budget."""

from __future__ import annotations

import math

import pytest
import torch
from mask_cases import NARROW

from genprune.costs import site_costs
from genprune.errors import NoMatchingSites
from genprune.families import denoiser, find_sites
from genprune.masks import HardConcrete
from genprune.masks.budget import BudgetController, expected_share, unit_shares
from genprune.masks.penalties import PENALTIES

CASES = [
    ("sd", NARROW),
    ("flux", NARROW),
    ("ddpm", NARROW),
    ("sd", ("branch",)),
    ("sd", ("heads", "neurons", "branch")),
    ("flux", ("heads", "neurons", "modulation", "branch", "block")),
    ("sd", ("heads", "channels", "block", "wrapper")),
    ("dit", ("neurons", "block")),
]


def hard_masks(sites, seed):
    """Half of the units of every site, at least one; half of the sites of one unit."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, site in sites.items():
        mask = torch.rand(site.size, generator=generator) < 0.5
        if site.size > 1:
            mask[0] = True
        masks[name] = mask
    return masks


@pytest.mark.parametrize("of", ["params", "macs"])
@pytest.mark.parametrize(("pipe", "kinds"), CASES, ids=str)
def test_the_expected_share_of_decided_masks_is_the_cost_of_the_plan(request, pipe, kinds, of):
    """Disjoint and nested kinds; attention matmuls are linear in the heads, so MACs are exact too."""
    model = denoiser(request.getfixturevalue(pipe))
    sites = find_sites(model)
    costs = site_costs(model, sites=sites)
    chosen = sites.of_kind(*(kind for kind in kinds if kind in sites.kinds()))
    dense = getattr(costs.total, of)
    shares = unit_shares(chosen, costs, dense, of)
    for seed in range(3):
        masks = hard_masks(chosen, seed)
        logits = {name: torch.where(mask, 10.0, -10.0).double() for name, mask in masks.items()}
        found = float(expected_share(logits, HardConcrete(), sites, shares, 1.0))
        assert found == pytest.approx(getattr(costs.predict(masks), of) / dense, abs=1e-6)
        assert found < 0.95  # so that the test can fail


def test_shares_count_what_was_cut_before_and_units(flux):
    model = denoiser(flux)
    sites = find_sites(model)
    costs = site_costs(model, sites=sites)
    chosen = sites.of_kind("heads", "neurons")
    units = sum(site.size for site in chosen.values())
    masks = hard_masks(chosen, 0)
    logits = {name: torch.where(mask, 10.0, -10.0) for name, mask in masks.items()}
    shares = unit_shares(chosen, costs, units, "units")
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert float(expected_share(logits, HardConcrete(), sites, shares, 1.0)) == pytest.approx(kept / units, abs=1e-6)
    double = 2 * costs.total.params  # the model is half of its dense one
    shares = unit_shares(chosen, costs, double, "params")
    expected = costs.predict(masks).params / double
    assert float(expected_share(logits, HardConcrete(), sites, shares, 0.5)) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(NoMatchingSites):
        unit_shares(chosen, site_costs(model, sites=sites.of_kind("neurons")), units, "params")


def test_the_expected_share_lies_between_and_rises_with_every_logit(sd):
    sites = find_sites(denoiser(sd))
    costs = site_costs(denoiser(sd), sites=sites)
    chosen = sites.of_kind("heads", "branch")
    shares = unit_shares(chosen, costs, costs.total.params, "params")
    logits = {name: torch.zeros(site.size, requires_grad=True) for name, site in chosen.items()}
    share = expected_share(logits, HardConcrete(), sites, shares, 1.0)
    assert 0 < float(share.detach()) < 1
    gradients = torch.autograd.grad(share, list(logits.values()))
    assert all(bool((gradient > 0).all()) for gradient in gradients)


class Toy:
    """Independent units: each has a cost and a loss that grows with what its gate takes away."""

    def __init__(self, units=200, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.worth = torch.exp(2 * torch.randn(units, generator=generator))
        cost = torch.rand(units, generator=generator) + 0.1
        self.cost, self.generator = cost / cost.sum(), generator

    def loss(self, logits, relaxation):
        uniform = torch.rand((4, len(logits)), generator=self.generator)
        gates = relaxation.gate(logits.expand(4, -1), uniform)
        return (self.worth * (1 - gates).square()).sum(1).mean()

    def run(self, keep, steps=200, init=2.0, worth=1.0):
        relaxation, penalty = HardConcrete(), PENALTIES["smooth_l0"]
        logits = torch.full_like(self.cost, init).requires_grad_()
        optimizer = torch.optim.AdamW([logits], lr=0.1, weight_decay=0)

        def share(sharpness):
            smooth = relaxation.smooth_probability(logits.detach(), 0.5)
            stays = (1 - sharpness) * smooth + sharpness * relaxation.probability(logits.detach(), 0.5)
            return float((stays * self.cost).sum())

        controller, prices, shares = BudgetController(keep, share(0.0), steps), [], []
        for step in range(steps):
            (gradient,) = torch.autograd.grad(worth * self.loss(logits, relaxation), logits)
            (push,) = torch.autograd.grad((self.cost * penalty(logits, relaxation)).sum(), logits)
            if controller.base is None:
                controller.begin([gradient], [push])
            logits.grad = gradient + controller.price * push
            optimizer.step()
            shares.append(share(controller.progress(step)))
            controller.update(step, shares[-1])
            prices.append(controller.price)
        return logits.detach(), shares, prices


@pytest.mark.parametrize("keep", [0.9, 0.8, 0.6, 0.4])
@pytest.mark.parametrize("worth", [1.0, 1e-6])
def test_the_price_brings_the_share_to_the_budget(keep, worth):
    toy = Toy()
    logits, shares, prices = toy.run(keep, worth=worth)
    assert shares[-1] == pytest.approx(keep, abs=5e-3)
    assert all(math.isfinite(price) and price > 0 for price in prices)
    removed = logits < 0
    ratio = toy.worth / toy.cost  # what goes is what is worth least per cost
    assert float(ratio[removed].median()) < float(ratio[~removed].median()) / 3


def test_the_price_answers_a_miss_at_once_and_finds_its_scale_slowly():
    controller = BudgetController(keep=0.5, start=1.0, steps=10, anneal=0.5, base=2.0)
    assert [round(controller.target(step), 6) for step in range(10)] == [0.9, 0.8, 0.7, 0.6] + [0.5] * 6
    controller.update(0, 0.9)
    assert controller.price == controller.base == 2.0  # on target
    controller.update(0, 0.91)
    assert controller.price == pytest.approx(2.0 * math.exp(controller.stiffness * 0.01 + controller.rate * 0.01))
    last = controller.base
    for step in range(10):
        controller.update(step, 1.0)
        assert last < controller.base < controller.price
        last = controller.base
    for _ in range(10):
        controller.update(9, 0.1)
        assert controller.price < controller.base < last
        last = controller.base


def test_the_price_stays_finite_where_nothing_answers_it():
    controller = BudgetController(keep=0.1, start=1.0, steps=5000, anneal=0.5, base=1.0)
    for step in range(5000):
        controller.update(step, 1.0)
    assert math.isfinite(controller.price)
    for _ in range(5000):
        controller.update(4999, 0.0)
    assert controller.price > 0


def test_the_first_price_balances_the_median_unit():
    controller = BudgetController(0.8, 1.0, 10)
    controller.begin([torch.tensor([-2.0, 0.0]), torch.tensor([6.0])], [torch.tensor([0.5, 0.5]), torch.tensor([1.0])])
    assert controller.price in (4.0, 6.0)
    controller.begin([torch.zeros(3)], [torch.ones(3)])  # in the dead zone: no gradient to balance
    assert controller.price == 1.0


def test_a_sharper_share_answers_less_to_decided_logits():
    from genprune.sites import Site, Sites

    sites = Sites.of("toy", [Site("a", "neurons", 3, ())])
    logits = {"a:neurons": torch.tensor([4.0, 1.5, -4.0], requires_grad=True)}
    blunt, blend, sharp = (
        expected_share(logits, HardConcrete(), sites, {"a:neurons": 1 / 3}, 1.0, sharpness)
        for sharpness in (0, 0.5, 1)
    )
    assert float(blend.detach()) == pytest.approx(float(blunt.detach() + sharp.detach()) / 2)
    (gradient,) = torch.autograd.grad(sharp, logits["a:neurons"], retain_graph=True)
    assert not gradient.any()  # the noise of a damping of 0.5 reaches 1.1
    (gradient,) = torch.autograd.grad(blunt, logits["a:neurons"])
    assert (gradient > 0).all()
