"""What pushes logits down: monotone forms, and every kind of site in the sum."""

from __future__ import annotations

import pytest
import torch
from mask_cases import NARROW, problem_of

from genprune.errors import GenpruneError
from genprune.masks import HardConcrete, MaskTraining
from genprune.masks.penalties import PENALTIES, check_penalty
from genprune.masks.training import _Run

LOGITS = torch.linspace(-12, 12, 481)


def slopes(name: str, damping: float) -> torch.Tensor:
    logits = LOGITS.clone().requires_grad_()
    values = PENALTIES[name](logits, HardConcrete(damping=damping))
    assert values.shape == logits.shape
    return torch.autograd.grad(values.sum(), logits)[0]


@pytest.mark.parametrize("damping", [0.1, 0.5, 1.0, 1e-6])
@pytest.mark.parametrize("name", ["smooth_l0", "expected_l0", "flat_sigmoid"])
def test_pitfall_9_the_penalty_never_raises_a_logit(name, damping):
    assert bool((slopes(name, damping) >= 0).all())
    if name != "expected_l0":  # that one is flat where the damped noise cannot close the gate
        assert bool((slopes(name, damping)[LOGITS.abs() < 8] > 0).all())


def test_pitfall_9_the_published_absolute_form_un_prunes():
    assert bool((slopes("absolute", 0.5)[LOGITS < 0] < 0).all())
    assert MaskTraining().penalty == "smooth_l0"


@pytest.mark.parametrize("name", PENALTIES)
def test_pitfall_8_every_kind_enters_the_penalty(flux, name):
    """AdaLN modulation included; each unit by what it costs."""
    kinds = [kind for kind in NARROW if kind != "channels"]
    problem = problem_of(flux, prompts=("a cat",), kinds=tuple(kinds))
    run = _Run(problem, MaskTraining(penalty=name, init=-1.5, validate_every=0), 0)
    gradients = dict(zip(run.logits, run._penalty_gradients()))
    assert {problem.sites[site].kind for site in gradients} == set(kinds)
    assert all(bool((gradient != 0).all()) for gradient in gradients.values())
    per_share = {float(g[0]) / problem.shares[site] for site, g in gradients.items()}
    assert max(per_share) == pytest.approx(min(per_share), rel=1e-5)  # pitfall 18: weighted by unit cost


def test_unknown_forms_are_refused():
    with pytest.raises(GenpruneError, match="penalty='smoth_l0', nearest name: 'smooth_l0'; expected one of"):
        check_penalty("smoth_l0")
