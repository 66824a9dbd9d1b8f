"""A cut that fails or is interrupted leaves the old model or the new one, over every family: never a mixture."""

from __future__ import annotations

import signal
from dataclasses import replace
from types import MethodType

import pytest
import torch
from family_cases import DenseRun, dense_run, random_keep, run
from torch import Tensor, nn

from genprune.cutting import applied_plan, cut, plan_base, pruned_widths
from genprune.errors import PlanMismatch, UnsupportedModel
from genprune.gates import attach_gates
from genprune.plan import PlanBase, PruningPlan


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_untouched(model: nn.Module, dense: DenseRun) -> None:
    assert type(model) is type(dense.model)
    assert [(path, type(m)) for path, m in model.named_modules()] == [
        (path, type(m)) for path, m in dense.model.named_modules()
    ]
    before = dense.model.state_dict()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert applied_plan(model) is None and pruned_widths(model) == {}
    with torch.no_grad():
        assert torch.equal(run(model, dense.inputs), dense.output)


def wrong_plans(dense: DenseRun) -> dict[str, tuple[PruningPlan, str]]:
    """Label -> a plan that does not fit, and the text that must be said: found, expected, what to type."""
    plan = dense.plan(random_keep(dense.sites, seed=1))
    name, site = next(iter(dense.sites.items()))
    base = plan.base
    long = torch.ones(site.size + 3, dtype=torch.bool)
    return {
        "unknown site": (
            replace(plan, keep={**plan.keep, f"{site.path}x:{site.kind}": torch.tensor([False])}),
            rf"names '{site.path}x:{site.kind}', which is no site .*nearest name: .*Plans for a cut model are",
        ),
        "wrong size": (
            replace(plan, keep={**plan.keep, name: long}),
            rf"has {site.size + 3} units at '{name}', the model has {site.size}.*gp.make_plan\(model",
        ),
        "other host": (
            replace(plan, base=PlanBase("OtherModel", base.sites_sha256)),
            rf"plan is for OtherModel, the model is {type(dense.model).__name__} .*gp.make_plan\(model",
        ),
        "other configuration": (
            replace(plan, base=PlanBase(base.host, "0" * 64)),
            rf"another configuration of {base.host} \(000000000000, this model is {base.sites_sha256[:12]}\)",
        ),
        "unknown operation": (
            replace(plan, ops=({"op": "fold"},)),
            r"operations that this genprune does not know: \['fold'\].*Upgrade with `pip install -U genprune`",
        ),
    }


@pytest.mark.parametrize(
    "label", ["unknown site", "wrong size", "other host", "other configuration", "unknown operation"]
)
def test_a_wrong_plan_says_so_and_changes_nothing(dense: DenseRun, label: str):
    plan, text = wrong_plans(dense)[label]
    model = dense.copy()
    with pytest.raises(PlanMismatch, match=text):
        cut(model, plan)
    assert_untouched(model, dense)


def test_a_cut_under_gates_is_refused(dense: DenseRun):
    model = dense.copy()
    plan = dense.plan(random_keep(dense.sites, seed=1))
    with attach_gates(model, plan):
        text = rf"gates are attached to {len(dense.sites)} sites .*expected a model without.*handle.remove\(\) first"
        with pytest.raises(PlanMismatch, match=text):
            cut(model, plan)
    assert_untouched(model, dense)


def test_a_plan_for_the_dense_model_does_not_fit_the_cut_one(dense: DenseRun):
    plan = dense.plan(random_keep(dense.sites, seed=1))
    model = cut(dense.copy(), plan)
    before = state_of(model)
    with pytest.raises(
        PlanMismatch, match="Was the model cut already|Make a plan for this model|another configuration"
    ):
        cut(model, plan)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert applied_plan(model) == plan


class Quantised(nn.Module):
    """A layer that is no plain linear, as quantisers and adapters put in place; computes the same."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer, self.weight = layer, layer.weight
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_a_layer_that_cannot_be_narrowed_is_refused_before_anything_changes(dense: DenseRun):
    model = dense.copy()
    name, site = next(iter(dense.sites.of_kind("heads").items()))
    path = site.slices[0].module
    layer = model.get_submodule(path)
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, Quantised(layer))
    before = state_of(model)
    keep = random_keep(dense.sites.of_kind("heads"), seed=3) | {name: torch.arange(site.size) > 0}
    with pytest.raises(UnsupportedModel, match=f"'{path}' is a Quantised; expected a Linear.*before it is quantised"):
        cut(model, PruningPlan(plan_base(model), keep))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert type(model) is type(dense.model) and pruned_widths(model) == {}


@pytest.mark.parametrize("moment", ["first", "middle", "last"])
def test_ctrl_c_leaves_the_old_or_the_new_model(dense: DenseRun, moment: str):
    plan = dense.plan(random_keep(dense.sites, seed=2))
    steps = interrupted_cut(dense.copy(), plan, at=None)
    model = dense.copy()
    with pytest.raises(KeyboardInterrupt):
        interrupted_cut(model, plan, at={"first": 1, "middle": steps - 5, "last": steps}[moment])
    del model.get_submodule
    if applied_plan(model) is None:
        assert_untouched(model, dense)
        return
    whole = cut(dense.copy(), plan)
    assert type(model) is type(whole) and applied_plan(model) == plan and pruned_widths(model) == pruned_widths(whole)
    with torch.no_grad():
        assert torch.equal(run(model, dense.inputs), run(whole, dense.inputs))


def interrupted_cut(model: nn.Module, plan: PruningPlan, at: int | None) -> int:
    """Cut, with a real SIGINT at the `at`-th time that the cut fetches a layer; returns how often it fetched one."""
    fetched = 0

    def get_submodule(self: nn.Module, path: str) -> nn.Module:
        nonlocal fetched
        fetched += 1
        if fetched == at:
            signal.raise_signal(signal.SIGINT)
        return type(self).get_submodule(self, path)

    model.get_submodule = MethodType(get_submodule, model)
    cut(model, plan)
    return fetched


def test_ctrl_c_in_the_middle_arrives_after_the_cut():
    dense = dense_run("vit")
    plan = dense.plan(random_keep(dense.sites, seed=2))
    model = dense.copy()
    with pytest.raises(KeyboardInterrupt):
        interrupted_cut(model, plan, at=interrupted_cut(dense.copy(), plan, at=None) - 5)  # the checks come first
    assert applied_plan(model) == plan
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
