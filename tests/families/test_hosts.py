"""What hosts offer goes on working: gradient checkpointing, processors, fused projections, compilation."""

from __future__ import annotations

import pytest
import torch
from family_cases import CASE_NAMES, DenseRun, dense_run, difference, random_keep, run

from genprune.cutting import cut, plan_base
from genprune.errors import UnsupportedModel
from genprune.gates import attach_gates
from genprune.plan import PruningPlan


def gate_gradients(model: torch.nn.Module, dense: DenseRun) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Output, gradient of every gate, and how often the gated layers ran."""
    torch.manual_seed(2)  # a DiT in training drops labels
    source = torch.Generator().manual_seed(9)
    gates = {name: torch.rand(site.size, generator=source).requires_grad_() for name, site in dense.sites.items()}
    calls = 0

    def count(*_) -> None:
        nonlocal calls
        calls += 1

    listeners = [
        model.get_submodule(point.module).register_forward_hook(count)
        for site in dense.sites.values()
        for point in site.gates
    ]
    with attach_gates(model, gates):
        output = run(model, dense.inputs)
        output.square().sum().backward()
    for listener in listeners:
        listener.remove()
    return output.detach(), {name: gate.grad for name, gate in gates.items()}, calls


def test_gradient_checkpointing_changes_nothing(dense: DenseRun):
    model = dense.copy().requires_grad_(False).train()  # no other dropout here; hosts checkpoint in training
    output, gradients, calls = gate_gradients(model, dense)
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
    else:
        model.enable_gradient_checkpointing()
    again, checkpointed, more_calls = gate_gradients(model, dense)
    assert more_calls > calls  # layers really ran again, in the backward pass
    assert difference(output, again) <= 1e-6
    for name, gradient in gradients.items():
        assert difference(gradient, checkpointed[name]) <= 1e-5, name


def diffusers_cut(name: str) -> tuple[DenseRun, torch.nn.Module]:
    dense = dense_run(name)
    units = [kind for kind in dense.case.kinds if kind not in ("branch", "block", "wrapper")]  # all attentions stay
    return dense, cut(dense.copy(), dense.plan(random_keep(dense.sites.of_kind(*units), seed=5, share=0.7)))


# diffusers' own fused processor fails on SD3.5's second attention, dense or cut: it asks for a text stream there.
# `UNet2DModel` and `DiTTransformer2DModel` fuse nothing.
FUSING = [
    name
    for name in CASE_NAMES
    if not name.startswith(("vit", "dit")) and name not in ("sd3-dual", "unet-unconditional")
]


@torch.no_grad()
@pytest.mark.parametrize("name", FUSING)
def test_fused_projections_of_a_cut_model_compute_the_same(name: str):
    dense, model = diffusers_cut(name)
    small = run(model, dense.inputs)
    nothing = PruningPlan(plan_base(model), {})
    model.fuse_qkv_projections()
    assert difference(small, run(model, dense.inputs)) <= 1e-5
    with pytest.raises(
        UnsupportedModel, match=r"fused projections; expected separate ones.*unfuse_qkv_projections\(\)"
    ):
        cut(model, nothing)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, dense.inputs), small)
    cut(model, nothing)  # unfused, it can be cut again


@torch.no_grad()
@pytest.mark.parametrize("name", ["unet", "unet-sdxl", "pixart"])
def test_another_attention_processor_on_a_cut_model(name: str):
    from diffusers.models.attention_processor import AttnProcessor

    dense, model = diffusers_cut(name)
    small = run(model, dense.inputs)
    model.set_attn_processor(AttnProcessor())  # matmul and softmax in place of the fused kernel
    assert len(model.attn_processors) > 0
    assert difference(small, run(model, dense.inputs)) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("way", ["gated", "cut"])
@pytest.mark.parametrize("name", ["unet", "flux", "dit", "pixart", "vit"])
def test_one_graph_compiles(name: str, way: str):
    torch.compiler.reset()
    dense = dense_run(name)
    plan = dense.plan(random_keep(dense.sites, seed=5, share=0.7))
    model = dense.copy()
    if way == "cut":
        cut(model, plan)
    else:
        attach_gates(model, plan)
    eager = run(model, dense.inputs)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(run(compiled, dense.inputs), eager)
