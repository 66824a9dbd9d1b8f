"""Plans with operators: gated == cut for every operator and host, costs, composition, files, refusals."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from family_cases import CASE_NAMES, DenseRun, dense_run, difference, run
from torch import Tensor, nn

import genprune as gp
from genprune.cutting import plan_base, pruned_ops
from genprune.operations import operation_tensors, replace_op
from genprune.operators import OPERATORS, build_operator


def settings_for(name: str, module: nn.Module) -> dict[str, Any] | None:
    """Settings under which the operator can stand for this module, or None."""
    choices: list[dict[str, Any]] = [{}, {"rank": 3}, {"multiplier": 2}]
    if hasattr(module, "out_channels"):
        choices.append({"channels": module.out_channels})
    if name == "linear":
        if type(module).__name__ not in ("FeedForward", "Mlp"):
            return None
        width = (module.net[2] if hasattr(module, "net") else module.fc2).out_features
        choices = [{"streams": [["hidden_states" if hasattr(module, "net") else "x", width, width]]}]
    for given in choices:
        try:
            build_operator(name, module, given)
        except gp.GenpruneError:
            continue
        return given
    return None


def operations(model: nn.Module, name: str, most: int = 2) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Operations that put this operator at the first modules that take it, with random values."""
    source, found = torch.Generator().manual_seed(5), 0
    for path, module in list(model.named_modules()):
        if not path or found == most or isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        settings = settings_for(name, module)
        if settings is None or (name == "drop_skip" and not path.startswith("up_blocks")):
            continue
        operator = build_operator(name, module, settings)
        if name == "drop_skip" and module.in_channels == module.out_channels:
            continue
        tensors = operation_tensors(path, operator)
        tensors = {
            key: torch.randn(value.shape, generator=source) * value[0].numel() ** -0.5
            for key, value in tensors.items()
        }
        found += 1
        yield replace_op(path, name, settings), tensors


def plan_with(
    dense: DenseRun, name: str, keep: dict[str, Tensor] | None = None, most: int = 1
) -> gp.PruningPlan | None:
    # the way down and the way up of a U-Net lose their resamplers together
    found = list(operations(dense.model, name, 2 if name == "drop_resampler" else most))
    if not found:
        return None
    tensors = {key: value for _, held in found for key, value in held.items()}
    return gp.PruningPlan(plan_base(dense.model), keep or {}, ops=tuple(op for op, _ in found), tensors=tensors)


@pytest.mark.parametrize("operator", OPERATORS)
@torch.no_grad()
def test_gated_equals_cut(dense: DenseRun, operator):
    plan = plan_with(dense, operator)
    if plan is None:
        pytest.skip(f"{dense.case.name} has no module for {operator}")
    model = dense.copy()
    with gp.attach_gates(model, plan):
        gated = run(model, dense.inputs)
    assert torch.equal(run(model, dense.inputs), dense.output)  # no trace
    cut = gp.cut(model, plan)
    assert difference(gated, run(cut, dense.inputs)) <= 1e-5
    assert difference(dense.output, gated) >= 1e-3
    assert [op["path"] for op in pruned_ops(cut)] == [op["path"] for op in plan.ops]


def first_case(operator: str) -> DenseRun:
    for name in CASE_NAMES:
        if plan_with(dense := dense_run(name), operator) is not None:
            return dense
    pytest.fail(f"no host takes {operator}")


_LOAD = """
import json, sys, torch
import genprune as gp
from safetensors.torch import load_file, save_file
model = gp.load_model(sys.argv[1])
inputs = load_file(sys.argv[2])
with torch.no_grad():
    output = model(**inputs)
save_file({"output": output if isinstance(output, torch.Tensor) else output.sample}, sys.argv[3])
"""


@pytest.mark.parametrize("operator", OPERATORS)
@torch.no_grad()
def test_saved_and_loaded_in_a_fresh_process(operator, tmp_path):
    from safetensors.torch import load_file, save_file

    dense = first_case(operator)
    model = gp.cut(dense.copy(), plan_with(dense, operator))
    gp.save_model(model, tmp_path / "model")
    tensors = {name: value.contiguous() for name, value in dense.inputs.items() if isinstance(value, Tensor)}
    if tensors.keys() != dense.inputs.keys():
        pytest.skip("inputs that are no tensors")
    save_file(tensors, tmp_path / "inputs.safetensors")
    names = [str(tmp_path / name) for name in ("model", "inputs.safetensors", "output.safetensors")]
    subprocess.run([sys.executable, "-c", _LOAD, *names], check=True, capture_output=True)
    assert torch.equal(load_file(names[2])["output"], run(model, dense.inputs))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["pruning"]["format_version"] == 2


def _unet_run() -> DenseRun:
    return dense_run("unet" if "unet" in CASE_NAMES else CASE_NAMES[0])


@torch.no_grad()
def test_a_plan_with_operators_travels(tmp_path):
    dense = _unet_run()
    plan = plan_with(dense, "low_rank", most=2)
    assert gp.PruningPlan.load(plan.save(tmp_path / "plan")) == plan
    assert gp.PruningPlan.load(plan.save(tmp_path / "plan.safetensors")) == plan


@torch.no_grad()
def test_the_stock_loader_refuses(tmp_path):
    from diffusers import UNet2DConditionModel

    dense = _unet_run()
    gp.cut(dense.copy(), plan_with(dense, "low_rank")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["_class_name"] = "UNet2DConditionModel"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError)):
        UNet2DConditionModel.from_pretrained(tmp_path)


@torch.no_grad()
def test_composition():
    dense = _unet_run()
    first = gp.make_plan(dense.model, gp.Magnitude(keep=0.95, kinds=("neurons",)))
    model = gp.cut(dense.copy(), first)
    at = next(path for path, m in model.named_modules() if path.endswith("attn1.to_q"))
    operator = OPERATORS["low_rank"].from_weights(model.get_submodule(at), {"rank": 3})
    second = gp.PruningPlan(
        plan_base(model), {}, ops=(replace_op(at, "low_rank", {"rank": 3}),), tensors=operation_tensors(at, operator)
    )
    twice = run(gp.cut(model, second), dense.inputs)
    once = run(gp.cut(dense.copy(), first.then(second)), dense.inputs)
    assert torch.equal(twice, once)


@torch.no_grad()
def test_an_operator_of_a_narrowed_layer_has_no_gate():
    dense = _unet_run()
    at = next(path for path, _ in dense.model.named_modules() if path.endswith("attn1.to_q"))
    heads = f"{at.removesuffix('.to_q')}:heads"
    mask = torch.ones(dense.sites[heads].size, dtype=torch.bool)
    mask[0] = False
    model = gp.cut(dense.copy(), gp.PruningPlan(plan_base(dense.model), {heads: mask}))
    operator = OPERATORS["low_rank"].from_weights(model.get_submodule(at), {"rank": 2})
    plan = gp.PruningPlan(
        plan_base(dense.model),
        {heads: mask},
        ops=(replace_op(at, "low_rank", {"rank": 2}),),
        tensors=operation_tensors(at, operator),
    )
    with pytest.raises(gp.PlanMismatch, match="narrows .* and then puts 'low_rank' there.*Cut a copy"):
        gp.attach_gates(dense.model, plan)
    assert torch.equal(run(dense.model, dense.inputs), dense.output)


@torch.no_grad()
def test_an_operator_inside_a_removed_block_is_moot():
    dense = _unet_run()
    block = next(name for name, site in dense.sites.items() if site.kind == "block")
    path = f"{dense.sites[block].path}.attn1.to_q"
    op, keep = replace_op(path, "low_rank", {"rank": 2}), {block: torch.zeros(1, dtype=torch.bool)}
    plan = gp.PruningPlan(plan_base(dense.model), keep, ops=(op,))
    alone = gp.PruningPlan(plan_base(dense.model), keep)
    assert torch.equal(run(gp.cut(dense.copy(), plan), dense.inputs), run(gp.cut(dense.copy(), alone), dense.inputs))


@torch.no_grad()
def test_sites_of_replaced_layers_are_gone_and_the_others_stay():
    dense = _unet_run()
    plan = plan_with(dense, "low_rank")
    path = plan.ops[0]["path"]
    sites = gp.find_sites(gp.cut(dense.copy(), plan))
    assert all(not piece.module.startswith(path) for site in sites.values() for piece in site.slices)
    untouched = {n for n, s in dense.sites.items() if not s.cuts_into([path])}
    assert untouched == set(sites)


@torch.no_grad()
def test_loading_cuts_with_operators(tmp_path):
    from genprune.slice_loading import load_cut

    dense = _unet_run()
    plan = plan_with(dense, "low_rank", most=2)
    dense.model.save_pretrained(tmp_path)
    assert torch.equal(run(load_cut(tmp_path, plan), dense.inputs), run(gp.cut(dense.copy(), plan), dense.inputs))


def test_bad_operations_change_nothing():
    dense = _unet_run()
    plan = plan_with(dense, "low_rank")
    op = plan.ops[0]
    bad = [
        ({**op, "op": "fold"}, plan.tensors, "does not know.*Upgrade"),
        ({**op, "path": op["path"] + "x"}, plan.tensors, "no module of this"),
        ({**op, "with": "low_rnk"}, plan.tensors, "low_rank"),
        ({**op, "settings": {"rank": 10**6}}, plan.tensors, "rank"),
        ({**op, "path": "conv_in"}, plan.tensors, "low_rank"),
        ({"op": "replace"}, plan.tensors, "an operation of the plan"),
        (op, {}, "is missing"),
    ]
    for wrong, tensors, message in bad:
        model = dense.copy()
        with pytest.raises(gp.PlanMismatch, match=message):
            gp.cut(model, dataclasses.replace(plan, ops=(wrong,), tensors=tensors))
        with torch.no_grad():
            assert torch.equal(run(model, dense.inputs), dense.output)


@torch.no_grad()
def test_costs_of_a_model_with_operators_are_exact():
    dense = _unet_run()
    plan = plan_with(dense, "low_rank", most=2)
    small = gp.cut(dense.copy(), plan)
    costs = gp.count_costs(small)
    assert costs.params == sum(p.numel() for p in small.parameters())
    fewer = gp.count_costs(dense.model)
    at = [dense.model.get_submodule(op["path"]) for op in plan.ops]
    saved = sum(m.weight.numel() - 3 * sum(m.weight.shape[:2]) for m in at)
    assert fewer.params - costs.params == saved
    assert costs.macs < fewer.macs


def test_a_lora_of_the_base_loses_what_operators_replaced():
    dense = _unet_run()
    plan = plan_with(dense, "low_rank")
    path = plan.ops[0]["path"]
    weight = dense.model.get_submodule(path).weight
    lora = {f"unet.{path}.lora_A.weight": torch.ones(2, weight.shape[1])}
    lora |= {f"unet.{path}.lora_B.weight": torch.ones(weight.shape[0], 2)}
    assert gp.adapt_lora(lora, plan, dense.model) == {}
