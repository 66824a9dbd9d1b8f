"""The differentiable chain: its gradient is that of plain backpropagation, its latents are the pipeline's own."""

from __future__ import annotations

import copy

import pytest
import torch
from chain_cases import CASES, Case, NoisyGates, OpenGates, drawn, gradients, relative_error

from genprune.denoising.capture import capture_runs, takes_prompts
from genprune.families import denoiser


@pytest.fixture(scope="module", params=CASES)
def chain(request, tmp_path_factory) -> tuple[object, Case]:
    case = CASES[request.param]
    return case.build(tmp_path_factory.mktemp("chain")), case


@pytest.fixture(scope="module")
def euler(tmp_path_factory):
    return CASES["euler"].build(tmp_path_factory.mktemp("euler")), CASES["euler"]


class Calls:
    """Counts forwards of a model."""

    def __init__(self, model):
        self.count = 0
        self.handle = model.register_forward_pre_hook(self.hook)

    def hook(self, module, inputs):
        self.count += 1

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.handle.remove()


def test_gradient_is_that_of_plain_backpropagation(chain):
    pipe, case = chain
    with NoisyGates(pipe) as gates:
        latents, found = gradients(pipe, case, gates)
        plain, expected = gradients(pipe, case, gates, activation_memory=None)
    assert torch.equal(latents, plain)
    assert all(float(grad.abs().sum()) > 0 for grad in expected)
    # float32 noise: the same sums, with the guidance and the solver in between.
    assert relative_error(found, expected) < 1e-5


def test_open_gates_give_the_pipelines_own_latents(chain):
    pipe, case = chain
    dense = drawn(pipe, case)
    with OpenGates(pipe) as gates:
        latents = drawn(pipe, case, gates=gates)
    assert latents.requires_grad and not dense.requires_grad
    assert torch.equal(latents, dense) and len(dense) == 2 and dense.dtype == torch.float32


def test_latents_are_the_stock_pipelines(chain):
    pipe, case = chain
    if "class_labels" in case.options:
        pytest.skip("its pipeline decodes whatever output_type says")
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (3, 4)]
    given = {"num_inference_steps": 3, "generator": generators} | case.options
    if takes_prompts(pipe):
        given |= {"prompt": ["a cat", "two dogs"], "output_type": "latent"}
        if "negative_prompt" in given:
            given["negative_prompt"] = [given["negative_prompt"]] * 2
        quiet = copy.copy(pipe)
        quiet.scheduler = copy.deepcopy(pipe.scheduler)
        assert torch.equal(quiet(**given).images, drawn(pipe, case))
    else:
        images = copy.deepcopy(pipe)(**given, batch_size=2, output_type="np").images
        latents = (drawn(pipe, case) / 2 + 0.5).clamp(0, 1)
        assert torch.equal(torch.from_numpy(images), latents.permute(0, 2, 3, 1))


def test_one_forward_a_call_and_one_more_in_backward(chain):
    """Pitfall 15: hooks on consumers and one product for latents and gates; no call is made a third time."""
    pipe, case = chain
    with NoisyGates(pipe) as gates, Calls(denoiser(pipe)) as calls:
        loss = drawn(pipe, case, gates=gates).square().mean()
        forwards, calls.count = calls.count, 0
        loss.backward()
        assert forwards == case.calls * case.calls_per_step
        assert calls.count == forwards


def test_the_pipeline_and_its_model_are_as_before(chain):
    pipe, case = chain
    model = denoiser(pipe)
    parameters = [
        p for part in pipe.components.values() if isinstance(part, torch.nn.Module) for p in part.parameters()
    ]
    next(model.parameters()).requires_grad_(False)  # a flag of the user's own
    flags = [p.requires_grad for p in parameters]
    before = dict(pipe.__dict__), dict(pipe.config), dict(pipe.scheduler.__dict__), torch.get_rng_state()
    with NoisyGates(pipe) as gates:
        drawn(pipe, case, gates=gates).square().mean().backward()
        assert all(logit.grad is not None for logit in gates.parameters())
    assert dict(pipe.__dict__) == before[0] and dict(pipe.config) == before[1]
    assert pipe.scheduler.__dict__.keys() == before[2].keys()
    assert all(value is before[2][name] for name, value in pipe.scheduler.__dict__.items())
    assert torch.equal(torch.get_rng_state(), before[3])
    assert [p.requires_grad for p in parameters] == flags
    assert all(p.grad is None for p in parameters)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_the_chain_gives_the_latents_that_calibration_sees(euler):
    pipe, case = euler
    (run,) = capture_runs(pipe, ["a cat", "two dogs"], seed=3, steps=3, height=16, width=16)
    assert torch.equal(run.latents, drawn(pipe, case))


def test_rows_start_from_their_own_seeds(euler):
    """Pitfall 13: the starting noise is the row's, whatever else is drawn with it."""
    pipe, case = euler
    both = drawn(pipe, case, seeds=(3, 4))
    assert not torch.equal(both, drawn(pipe, case, seeds=(3, 5)))
    torch.testing.assert_close(both[:1], drawn(pipe, case, seeds=(3,)), rtol=1e-3, atol=1e-3)


def test_pitfall_5_input_scaling_is_recomputed_with_the_step_it_had(euler):
    """Euler scales its input by a sigma looked up with the solver's index, which has moved on when backward comes."""
    pipe, case = euler
    seen = []
    hook = denoiser(pipe).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0].detach().clone(), args[1].clone())), with_kwargs=True
    )
    with hook, NoisyGates(pipe) as gates:
        drawn(pipe, case, gates=gates).square().mean().backward()
    first, again = seen[:3], seen[3:][::-1]
    for (sample, timestep), (sample_again, timestep_again) in zip(first, again, strict=True):
        assert torch.equal(sample, sample_again) and torch.equal(timestep, timestep_again)


def test_pitfall_6_noise_of_the_gates_is_replayed(euler):
    pipe, case = euler
    with NoisyGates(pipe, noise=3.0) as gates:
        _, found = gradients(pipe, case, gates)
        assert gates.steps_set == [0, 1, 2, 2, 1, 0]
        _, expected = gradients(pipe, case, gates, activation_memory=None)
        assert relative_error(found, expected) < 1e-5
        gates.noise = 0.0
        _, other = gradients(pipe, case, gates)
    assert relative_error(found, other) > 0.1  # the steps do differ, so that the test can fail


def test_pitfall_7_history_of_a_multistep_solver_carries_gradient(tmp_path):
    """A second-order step reads the prediction before: cutting that path changes the gradient."""
    case = CASES["dpm++ 2m"]
    pipe = case.build(tmp_path)
    with NoisyGates(pipe) as gates:
        _, expected = gradients(pipe, case, gates, activation_memory=None)
        _, found = gradients(pipe, case, gates)
        assert relative_error(found, expected) < 1e-5
        pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, solver_order=1)
        _, first_order = gradients(pipe, case, gates)
    assert relative_error(first_order, expected) > 1e-2


def test_pitfall_14_every_setting_of_memory_gives_the_same(euler):
    pipe, case = euler
    with NoisyGates(pipe) as gates:
        plain, expected = gradients(pipe, case, gates, activation_memory=None)
        for settings in ({}, {"activation_memory": "1 GiB"}, {"block_checkpointing": True}):
            latents, found = gradients(pipe, case, gates, **settings)
            assert torch.equal(latents, plain)
            assert relative_error(found, expected) < 1e-5


def test_gradients_add_up_over_backwards(euler):
    pipe, case = euler
    with NoisyGates(pipe) as gates:
        _, expected = gradients(pipe, case, gates)
        loss = drawn(pipe, case, gates=gates).square().mean()
        loss.backward(retain_graph=True)
        once = [logit.grad.clone() for logit in gates.parameters()]
        loss.backward()
        assert relative_error([logit.grad for logit in gates.parameters()], [2 * grad for grad in once]) < 1e-6
        assert len(expected) == len(once)


def test_without_grad_mode_there_is_no_graph(euler):
    pipe, case = euler
    with NoisyGates(pipe) as gates, torch.no_grad():
        latents = drawn(pipe, case, gates=gates)
        assert not latents.requires_grad and gates.steps_set == [0, 1, 2]
        assert torch.equal(latents, drawn(pipe, case, gates=gates))


def test_a_model_in_bfloat16_keeps_float32_gradients(tmp_path):
    """Pitfall 10: logits stay float32 where the model is not."""
    case = CASES["flux"]
    pipe = case.build(tmp_path).to(torch.bfloat16)
    with NoisyGates(pipe) as gates:
        latents, found = gradients(pipe, case, gates)
        plain, expected = gradients(pipe, case, gates, activation_memory=None)
    assert latents.dtype == torch.bfloat16 and torch.equal(latents, plain)
    assert all(grad.dtype == torch.float32 for grad in found)
    # Sums over steps are made in another order, in bfloat16 between the calls.
    assert relative_error(found, expected) < 1e-2
