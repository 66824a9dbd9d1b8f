"""What a chain keeps in memory, what a budget buys, and hosts that are offloaded, compiled or out of memory."""

from __future__ import annotations

import gc

import pytest
import torch
from chain_cases import CASES, NoisyGates, drawn, gradients, relative_error
from tiny_pipelines import ddpm_pipeline
from torch import nn

from genprune.denoising import draw_latents, trajectory
from genprune.denoising.activation_memory import KeptGraphs, SavedBytes, memory_bytes
from genprune.errors import GenpruneError
from genprune.families import denoiser


@pytest.fixture(scope="module", params=["euler", "dpm++ 2m", "flux true guidance"])
def chain(request, tmp_path_factory):
    case = CASES[request.param]
    return case.build(tmp_path_factory.mktemp("chain")), case


@pytest.fixture
def euler(tmp_path):
    return CASES["euler"].build(tmp_path), CASES["euler"]


def saved_bytes(pipe, case, gates, **more) -> int:
    with SavedBytes(denoiser(pipe)) as saved:
        latents = drawn(pipe, case, gates=gates, **more)
    assert latents.requires_grad
    return saved.total


def forwards_in_backward(pipe, case, gates, **more) -> int:
    loss, seen = drawn(pipe, case, gates=gates, **more).square().mean(), []
    with denoiser(pipe).register_forward_pre_hook(lambda module, inputs: seen.append(1)):
        loss.backward()
    return len(seen)


def test_a_step_adds_latents_and_nothing_else(chain):
    pipe, case = chain
    with NoisyGates(pipe) as gates:
        latent = 2 * drawn(pipe, case).nbytes  # two rows under guidance
        few, many = (saved_bytes(pipe, case, gates, num_inference_steps=steps) for steps in (5, 25))
        plain = saved_bytes(pipe, case, gates, num_inference_steps=5, activation_memory=None)
    # Input and output of each call, and what the solver saves of them (products with the noise levels).
    assert many - few <= 20 * case.calls_per_step * 6 * latent
    assert plain > 20 * few


@pytest.mark.parametrize("room", [1, 2, 3, 100])
def test_a_budget_keeps_the_graphs_of_the_last_calls(chain, room):
    pipe, case = chain
    steps = 4
    calls = steps * case.calls_per_step
    with NoisyGates(pipe) as gates:
        shared = {"num_inference_steps": steps}
        one = saved_bytes(pipe, case, gates, **shared, activation_memory=None) // calls
        budget = int((room + 0.5) * one)
        _, expected = gradients(pipe, case, gates, **shared, activation_memory=None)
        latents, found = gradients(pipe, case, gates, **shared, activation_memory=budget)
        again = forwards_in_backward(pipe, case, gates, **shared, activation_memory=budget)
        kept = saved_bytes(pipe, case, gates, **shared, activation_memory=budget)
    assert relative_error(found, expected) < 1e-5
    assert again == max(calls - room, case.calls_per_step)  # the first step is never kept: it is measured
    assert kept <= budget + one  # beside the latents of the other calls


def test_sizes_are_read():
    assert memory_bytes("8GiB") == 8 * 2**30 and memory_bytes("1.5 mb") == 1_500_000 and memory_bytes(7) == 7
    assert memory_bytes("one call") is None
    for bad in ("8", "lots", 0, -1, True, 1.5, "0GiB"):
        with pytest.raises(
            GenpruneError, match=r'expected None, "one call", or a size above 0 in bytes\. Pass e\.g\.'
        ):
            memory_bytes(bad)


def test_kept_graphs_never_exceed_their_room():
    graphs = KeptGraphs(25)
    graphs.measured(10, block_checkpointing=False)
    kept = [graphs.keep_next(step, steps=4) for step in (0, 1, 1, 2, 2, 3, 3)]  # more calls than the first step told
    assert sum(kept) == 2 and not kept[0]


def test_a_budget_below_one_call_names_block_checkpointing(euler):
    pipe, case = euler
    with NoisyGates(pipe) as gates:
        with pytest.raises(GenpruneError, match=r"saves \d.* MiB for its gradient.*Pass block_checkpointing=True"):
            drawn(pipe, case, gates=gates, activation_memory="1 KiB")
        with pytest.raises(GenpruneError, match="Pass fewer seeds at once"):
            drawn(pipe, case, gates=gates, activation_memory="1 KiB", block_checkpointing=True)


@pytest.mark.parametrize("name", ["euler", "sdxl", "sd3", "flux true guidance", "unconditional ddpm", "dit"])
def test_block_checkpointing_gives_the_same_gradient_for_less_memory(name, tmp_path):
    case = CASES[name]
    pipe = case.build(tmp_path)
    model = denoiser(pipe)
    with NoisyGates(pipe) as gates:
        _, expected = gradients(pipe, case, gates, activation_memory=None)
        latents, found = gradients(pipe, case, gates, block_checkpointing=True)
        _, budgeted = gradients(pipe, case, gates, block_checkpointing=True, activation_memory="1 GiB")
    assert relative_error(found, expected) < 1e-5 and relative_error(budgeted, expected) < 1e-5
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_a_host_that_checkpoints_its_blocks_already(euler):
    """Kept graphs must not recompute blocks in backward: the gates have moved on by then."""
    pipe, case = euler
    with NoisyGates(pipe) as gates:
        _, expected = gradients(pipe, case, gates, activation_memory=None)
        pipe.unet.enable_gradient_checkpointing()
        for settings in ({}, {"activation_memory": None}, {"activation_memory": "1 GiB"}):
            assert relative_error(gradients(pipe, case, gates, **settings)[1], expected) < 1e-5
        assert any(getattr(module, "gradient_checkpointing", False) for module in pipe.unet.modules())


def test_weights_that_offloading_moves(euler):
    from accelerate import cpu_offload

    pipe, case = euler
    with NoisyGates(pipe) as gates:
        plain, expected = gradients(pipe, case, gates)
        flags = [p.requires_grad for p in pipe.unet.parameters()]
        cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
        assert next(pipe.unet.parameters()).is_meta
        latents, found = gradients(pipe, case, gates)
    assert torch.equal(latents, plain) and relative_error(found, expected) < 1e-5
    assert [p.requires_grad for p in pipe.unet.parameters()] == flags


def test_a_compiled_denoiser(euler):
    pipe, case = euler
    with NoisyGates(pipe) as gates:
        plain, expected = gradients(pipe, case, gates)
        pipe.unet = torch.compile(pipe.unet, backend="eager")
        latents, found = gradients(pipe, case, gates)
    torch.testing.assert_close(latents, plain)
    assert relative_error(found, expected) < 1e-4  # the compiler may fuse and reorder


def test_autocast_is_in_force_in_the_recompute(euler):
    pipe, case = euler
    with NoisyGates(pipe) as gates:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plain = drawn(pipe, case, gates=gates, activation_memory=None)
            latents = drawn(pipe, case, gates=gates)
        assert torch.equal(latents, plain)
        found = torch.autograd.grad(latents.square().mean(), gates.parameters())
        expected = torch.autograd.grad(plain.square().mean(), gates.parameters())
    assert relative_error(found, expected) < 2e-2  # bfloat16 inside


class Full:
    """A model that runs out of memory from call `first` on."""

    def __init__(self, model: nn.Module, first: int):
        self.left = first
        self.handle = model.register_forward_pre_hook(self.hook)

    def hook(self, module, inputs):
        self.left -= 1
        if self.left < 0:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"activation_memory": None}, 'Pass activation_memory="one call"'),
        ({"activation_memory": "1GiB"}, "Pass a smaller activation_memory"),
        ({}, "Pass block_checkpointing=True"),
        ({"block_checkpointing": True}, "pass fewer seeds or a smaller image"),
    ],
)
def test_full_memory_says_what_to_switch_on(euler, settings, advice):
    pipe, case = euler
    with NoisyGates(pipe) as gates:
        full = Full(pipe.unet, first=1)
        with full.handle, pytest.raises(GenpruneError, match=f"the memory is full in denoiser call .*{advice}"):
            drawn(pipe, case, gates=gates, **settings)
        full = Full(pipe.unet, first=4)  # in the recompute
        if settings.get("activation_memory", "") == "":
            with full.handle, pytest.raises(GenpruneError, match=advice):
                drawn(pipe, case, gates=gates, **settings).square().mean().backward()
    assert all(p.requires_grad for p in pipe.unet.parameters())


def test_no_run_waits_for_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            draw_latents(ddpm_pipeline(), seeds=[0], num_inference_steps=2)
        assert not [each for each in gc.get_objects() if type(each) is trajectory._Run]
    finally:
        gc.enable()
