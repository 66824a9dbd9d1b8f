"""The invariant, over every family: a gated model and the one that is really cut compute the same."""

from __future__ import annotations

import pytest
import torch
from family_cases import FAMILY_CASES, DenseRun, dense_run, difference, random_keep, removed_keep, run
from torch import Tensor, nn

from genprune.cutting import applied_plan, cut, plan_base, pruned_widths
from genprune.families import find_sites
from genprune.gates import attach_gates
from genprune.plan import PruningPlan
from genprune.replacements import ScatteredLinear, Tombstone
from genprune.sites import Sites

TOLERANCE = 1e-5  # relative, float32: the order of additions differs, nothing else


def test_every_family_has_its_kinds(dense: DenseRun):
    assert dense.sites.kinds() == dense.case.kinds
    assert not dense.sites.refused


@torch.no_grad()
def test_keeping_everything_is_bit_identical(dense: DenseRun):
    everything = {name: torch.ones(site.size, dtype=torch.bool) for name, site in dense.sites.items()}
    model = cut(dense.copy(), dense.plan(everything))
    assert torch.equal(run(model, dense.inputs), dense.output)
    assert all(torch.equal(value, dense.model.state_dict()[key]) for key, value in model.state_dict().items())


def plans(sites: Sites, way: str) -> list[tuple[str, dict[str, Tensor]]]:
    """Masks for each kind alone and for all kinds together."""
    keep = removed_keep(sites) if way == "everything" else random_keep(sites, seed=11, share=0.6)
    chosen = [("all kinds", keep)]
    for kind in sites.kinds():
        of_kind = sites.of_kind(kind)
        if way == "everything":
            masks = {name: keep[name] for name in of_kind}
        else:
            masks = random_keep(of_kind, seed=12, share=0.5)
        chosen.append((kind, masks))
    return chosen


@torch.no_grad()
@pytest.mark.parametrize("way", ["random", "everything"])
def test_gated_equals_cut(dense: DenseRun, way: str):
    for label, keep in plans(dense.sites, way):
        plan = dense.plan(keep)
        with attach_gates(dense.model, plan):
            gated = run(dense.model, dense.inputs)
        model = cut(dense.copy(), plan)
        assert difference(gated, run(model, dense.inputs)) <= TOLERANCE, label
        assert difference(dense.output, gated) >= 1e-2, f"{label}: the plan changes too little to tell"


@torch.no_grad()
@pytest.mark.parametrize("way", ["random", "everything"])
def test_gated_equals_cut_on_the_branch_alone(dense: DenseRun, way: str):
    """One site of each kind, seen at its own layer: the residual stream hides nothing there."""
    for kind in dense.sites.kinds():
        name, site = next(iter(dense.sites.of_kind(kind).items()))
        mask = torch.zeros(site.size, dtype=torch.bool)
        if way == "random" and site.size > 1:
            mask[: site.size // 2] = True
        places = [site.gates[0].module, site.path]
        plan = dense.plan({name: mask})
        plain = outputs_at(dense.model, dense.inputs, places)
        with attach_gates(dense.model, plan):
            gated = outputs_at(dense.model, dense.inputs, places)
        small = outputs_at(cut(dense.copy(), plan), dense.inputs, places)
        # A removed module is not called; then its place in the next larger part is compared.
        place = next(place for place in places if place in gated and place in small)
        assert difference(gated[place], small[place]) <= TOLERANCE, (name, place)
        assert difference(plain[place], gated[place]) >= 1e-2, (name, place)


def outputs_at(model: nn.Module, inputs: dict, places: list[str]) -> dict[str, Tensor]:
    """What the modules at these paths return in one forward call; tuples joined along the tokens."""
    seen: dict[str, Tensor] = {}

    def listen(place: str):
        def hook(module: nn.Module, arguments: tuple, output) -> None:
            seen[place] = torch.cat([x.flatten(1) for x in output], dim=1) if isinstance(output, tuple) else output

        return hook

    handles = []
    for place in places:
        try:
            handles.append(model.get_submodule(place).register_forward_hook(listen(place)))
        except AttributeError:  # went with what held it
            continue
    run(model, inputs)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def test_a_second_cut_composes(dense: DenseRun):
    for seed in range(3):
        first = dense.plan(random_keep(dense.sites, seed=seed, share=0.8))
        model = cut(dense.copy(), first)
        left = find_sites(model)
        second = PruningPlan(plan_base(model), random_keep(left, seed=seed + 10, share=0.7))
        with attach_gates(model, second):
            gated = run(model, dense.inputs)
        cut(model, second)
        assert difference(gated, run(model, dense.inputs)) <= TOLERANCE
        joined = first.then(second)
        at_once = cut(dense.copy(), joined)
        assert torch.equal(run(at_once, dense.inputs), run(model, dense.inputs))
        assert {key: value.shape for key, value in at_once.state_dict().items()} == {
            key: value.shape for key, value in model.state_dict().items()
        }
        assert applied_plan(model) == applied_plan(at_once) == joined
        assert pruned_widths(model) == pruned_widths(at_once)


def test_a_cut_model_lists_what_is_left(dense: DenseRun):
    keep = random_keep(dense.sites, seed=4, share=0.6)
    model = cut(dense.copy(), dense.plan(keep))
    left = find_sites(model)
    for name, mask in keep.items():
        removed = not mask.any() or any(not keep[parent].any() for parent in dense.sites.ancestors(name))
        if removed:
            assert name not in left
        elif name in left:
            assert left[name].size == int(mask.sum()), name
        else:  # its units went, the branch that held them stays as a bias
            inside = [other for other in dense.sites if name in dense.sites.ancestors(other)]
            assert any(not keep[other].any() for other in inside), name
    assert len(find_sites(cut(dense.copy(), dense.plan(removed_keep(dense.sites))))) == 0
    for kind in dense.sites.kinds():
        keep = removed_keep(dense.sites.of_kind(kind))
        assert not keep.keys() & find_sites(cut(dense.copy(), dense.plan(keep))).keys()


@torch.no_grad()
def test_size_attributes_equal_the_tensors_that_they_describe(dense: DenseRun):
    units = [kind for kind in dense.sites.kinds() if kind not in ("branch", "block", "wrapper")]
    model = cut(dense.copy(), dense.plan(random_keep(dense.sites.of_kind(*units), seed=6, share=0.6)))
    checked = 0
    for path, module in model.named_modules():
        for name, value in described(module).items():
            assert value == getattr(module, name), f"{path}.{name}"
            checked += 1
    assert checked >= 10


def described(module: nn.Module) -> dict[str, object]:
    """What a module's public size attributes must be, read off its tensors."""
    kind = next(cls.__name__ for cls in type(module).__mro__ if cls.__name__ != "Fixed")
    if isinstance(module, Tombstone):
        return {}
    if isinstance(module, nn.Linear):
        found = {"out_features": module.weight.shape[0], "in_features": module.weight.shape[1]}
        return found | ({"out_features": module.index.numel()} if isinstance(module, ScatteredLinear) else {})
    if isinstance(module, nn.Conv2d):
        return {"out_channels": module.weight.shape[0], "in_channels": module.weight.shape[1]}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": module.weight.shape[0]}
    if kind == "Attention" and hasattr(module, "to_q"):  # diffusers
        width = module.to_q.weight.shape[0]
        heads = round(width * module.scale**2)  # scale = head_dim ** -0.5, and no cut may change it
        return {"heads": heads, "sliceable_head_dim": heads, "inner_dim": width, "inner_kv_dim": width}
    if kind == "FluxAttention":
        width = module.to_q.weight.shape[0]
        found = {"heads": width // module.norm_q.weight.shape[0], "inner_dim": width}
        return found | ({"out_dim": width} if module.pre_only else {"out_dim": module.to_out[0].weight.shape[0]})
    if kind == "FluxSingleTransformerBlock":
        return {"mlp_hidden_dim": module.proj_mlp.weight.shape[0]}
    if kind in ("Attention", "AttentionRope"):  # timm
        width = module.proj.weight.shape[1]
        found = {"attn_dim": width, "num_heads": round(width * module.scale**2)}
        return found | ({"kv_dim": width, "num_kv_heads": found["num_heads"]} if kind == "AttentionRope" else {})
    return {}


@torch.no_grad()
@pytest.mark.parametrize("name", [case.name for case in FAMILY_CASES if "channels" in case.kinds])
def test_group_norm_statistics_of_kept_groups_stay(name: str):
    dense = dense_run(name)
    channels = dense.sites.of_kind("channels")
    keep = random_keep(channels, seed=8, share=0.6)
    first = next(iter(keep))  # the first ResNet reads the same input in both models
    places = [f"{channels[first].path}.norm2"]
    plain = outputs_at(dense.model, dense.inputs, places)[places[0]]
    small = outputs_at(cut(dense.copy(), dense.plan({first: keep[first]})), dense.inputs, places)[places[0]]
    kept = keep[first].repeat_interleave(plain.shape[1] // channels[first].size)
    assert 0 < int(kept.sum()) < len(kept)
    assert difference(plain[:, kept], small) <= TOLERANCE


def test_packed_widths_of_flux_follow_the_cut():
    dense = dense_run("flux")
    name = "single_transformer_blocks.0"
    keep = {
        f"{name}.attn:heads": torch.tensor([True, False, False, True]),
        f"{name}.proj_mlp:neurons": torch.arange(128) < 9,
    }
    block = cut(dense.copy(), dense.plan(keep)).get_submodule(name)
    assert block.proj_out._tp_packed_row_blocks == [16, 9]
    assert dense.model.get_submodule(name).proj_out._tp_packed_row_blocks == [32, 128]
    assert block.proj_out.in_features == 25
