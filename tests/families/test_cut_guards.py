"""A cut is refused where it would break the model, and a cut that fails midway leaves a model that says so."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from family_cases import DenseRun, dense_run, random_keep, removed_keep, run

import genprune as gp
from genprune import cut_guards, cutting
from genprune.cutting import applied_plan, cut, pruned_widths
from genprune.plan import PruningPlan
from genprune.replacements import PassThrough

MIDWAY = "a cut of this .* failed midway .*expected a whole model. Load it again"


def failing_at(monkeypatch: pytest.MonkeyPatch, call: int | None) -> list[None]:
    """Have the `call`-th new layer raise, as a full device does; the list grows with every call."""
    calls, selected = [], cutting._selected

    def fails(*arguments):
        calls.append(None)
        if len(calls) == call:
            raise torch.OutOfMemoryError("out of memory, on purpose")
        return selected(*arguments)

    monkeypatch.setattr(cutting, "_selected", fails)
    return calls


@pytest.mark.parametrize("moment", ["first", "last"])
def test_a_cut_that_fails_midway_leaves_a_model_that_refuses_everything(
    dense: DenseRun, moment, monkeypatch, tmp_path
):
    plan = dense.plan(random_keep(dense.sites.of_kind("heads"), seed=2))
    with monkeypatch.context() as patch:
        steps = failing_at(patch, None)
        cut(dense.copy(), plan)
    model = dense.copy()
    with monkeypatch.context() as patch:
        failing_at(patch, 1 if moment == "first" else len(steps))
        with pytest.raises(gp.CutFailed, match=r"midway \(OutOfMemoryError: out of memory, on purpose\) and left"):
            cut(model, plan)
    copied = copy.deepcopy(model)
    for broken in (model, copied):
        with pytest.raises(gp.CutFailed, match=MIDWAY), torch.no_grad():
            run(broken, dense.inputs)
        for save in (broken.state_dict, lambda broken=broken: gp.save_model(broken, tmp_path / "saved")):
            with pytest.raises(gp.GenpruneError, match=MIDWAY):  # timm's errors come as an UnsupportedModel
                save()
        with pytest.raises(gp.CutFailed, match=MIDWAY):
            cut(broken, plan)
    assert not (tmp_path / "saved").exists()


def test_without_room_for_the_largest_layer_the_model_is_as_it_was(monkeypatch):
    dense = dense_run("unet")
    model, asked = dense.copy(), []

    def no_room(size, **where):
        asked.append(size)
        raise torch.OutOfMemoryError("no room, on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(cut_guards.torch, "empty", no_room)
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            cut(model, dense.plan(random_keep(dense.sites, seed=2)))
    assert 0 < asked[0] <= max(parameter.nbytes for parameter in dense.model.parameters())
    assert type(model) is type(dense.model) and applied_plan(model) is None and pruned_widths(model) == {}
    with torch.no_grad():
        assert torch.equal(run(model, dense.inputs), dense.output)


# ---- models that are refused ----------------------------------------------------------------------------------------


def blocks_plan(dense: DenseRun) -> PruningPlan:
    """A plan that narrows no layer: every block goes."""
    return dense.plan(removed_keep(dense.sites.of_kind("block")))


@pytest.mark.parametrize("share", [None, 0.6])
def test_a_model_with_an_adapter_is_refused(share):
    from peft import LoraConfig

    dense = dense_run("unet")
    plan = blocks_plan(dense) if share is None else dense.plan(random_keep(dense.sites, seed=1, share=share))
    model = dense.copy()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    before = list(model.state_dict())
    with pytest.raises(gp.PlanMismatch, match=r"an adapter is on \d+ layers .*to_q.*fuse_lora\(\).*unload_lora_weig"):
        cut(model, plan)
    assert list(model.state_dict()) == before and type(model) is type(dense.model)
    model.unload_lora()
    assert pruned_widths(cut(model, plan))


def test_an_offload_that_holds_the_weights_is_refused():
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    dense = dense_run("unet")
    plan = dense.plan(random_keep(dense.sites, seed=1))
    model = dense.copy()
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(
        gp.PlanMismatch, match=r"offloading holds the weights of '.*'.*pipe.remove_all_hooks\(\) first"
    ):
        cut(model, plan)
    remove_hook_from_submodules(model)
    with torch.no_grad():
        assert torch.equal(run(cut(model, plan), dense.inputs), run(cut(dense.copy(), plan), dense.inputs))


def test_group_offloading_is_refused():
    dense = dense_run("unet")
    model = dense.copy()
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(gp.PlanMismatch, match="group offloading holds a list of the weights.*Load it again"):
        cut(model, blocks_plan(dense))


def test_an_offload_of_whole_models_goes_on_after_the_cut():
    from accelerate import cpu_offload_with_hook

    dense = dense_run("unet")
    plan = dense.plan(random_keep(dense.sites, seed=1))
    model = dense.copy()
    cpu_offload_with_hook(model, execution_device="cpu")  # what pipe.enable_model_cpu_offload() calls
    cut(model, plan)
    with torch.no_grad():
        assert torch.equal(run(model, dense.inputs), run(cut(dense.copy(), plan), dense.inputs))


def test_a_model_without_weights_stays_cuttable():
    dense = dense_run("unet")
    model = cut(dense.copy().to("meta"), blocks_plan(dense))
    assert any(isinstance(module, PassThrough) for module in model.modules())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


# ---- what stands for a plan -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_path", [Path, str])
def test_the_path_of_a_plan_is_as_good_as_the_plan(tmp_path, as_path):
    dense = dense_run("vit")
    plan = dense.plan(random_keep(dense.sites, seed=1))
    path = as_path(plan.save(tmp_path / "plan"))
    model = dense.copy()
    with torch.no_grad(), gp.attach_gates(model, plan):
        gated = run(model, dense.inputs)
    with torch.no_grad(), gp.attach_gates(model, path):
        assert torch.equal(run(model, dense.inputs), gated)
    assert applied_plan(cut(model, path)) == plan


def test_what_is_no_plan_is_refused():
    model = dense_run("vit").copy()
    for wrong in ({"blocks.0:block": torch.tensor([False])}, None, 3):
        with pytest.raises(gp.PlanMismatch, match="the plan is a .*expected a PruningPlan, or the path.*gp.make_plan"):
            cut(model, wrong)
    for wrong in (None, 3, [torch.ones(1)]):
        with pytest.raises(gp.PlanMismatch, match="the plan is a .*expected a PruningPlan, or the path"):
            gp.attach_gates(model, wrong)
    for call in (cut, gp.attach_gates):
        with pytest.raises(gp.PlanMismatch, match="no plan at 'no-such-plan'"):
            call(model, "no-such-plan")
