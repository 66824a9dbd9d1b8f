"""Experts by noise level inside one chain: what switching by hand gives, with K - 1 switches."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from routed_cases import ROUNDING, SIZE, seeded, strong_
from router_cases import WORDS, expert_plans
from tiny_pipelines import flux_pipeline, pixart_sigma_pipeline, sd3_pipeline, sd_pipeline

import genprune as gp
from genprune.families import denoiser_slot
from genprune.pipelines import RoutedPipeline
from genprune.pipelines.step_experts import StepExperts
from genprune.routers import Expert, TimestepRouter

BOUNDARIES = (0.4, 0.75)


def parts(make, folder):
    pipe = make(folder)
    strong_(getattr(pipe, denoiser_slot(pipe)))
    pipe.set_progress_bar_config(disable=True)
    plans = expert_plans(pipe, 3)
    return pipe, TimestepRouter([Expert(plan) for plan in plans], BOUNDARIES, base=plans[0].base)


class ByHand:
    """Puts the cut model of the next step into the pipeline, in the callback after each step."""

    def __init__(self, pipe, router):
        self.pipe, self.slot, self.router = copy.copy(pipe), denoiser_slot(pipe), router
        dense = getattr(pipe, self.slot)
        self.cuts = [gp.cut(copy.deepcopy(dense), plan) for plan in router.plans]

    def choose(self, timestep) -> None:
        self.pipe.__dict__[self.slot] = self.cuts[self.router.expert_at(float(timestep) / 1000)]

    def after(self, pipe, step, timestep, tensors):
        if step + 1 < len(pipe.scheduler.timesteps):
            self.choose(pipe.scheduler.timesteps[step + 1])
        return tensors

    def draw(self, first, *args, **kwargs):
        self.choose(first)
        return self.pipe(*args, callback_on_step_end=self.after, **kwargs).images


@pytest.mark.parametrize("store", ["reordered", "materialised"])
@pytest.mark.parametrize("make", [sd_pipeline, flux_pipeline, sd3_pipeline])
def test_equals_switching_by_hand(make, store, tmp_path):
    pipe, router = parts(make, tmp_path)
    given = {**SIZE, "num_inference_steps": 6, "output_type": "latent"}
    by_hand = ByHand(pipe, router)
    dense = pipe(WORDS[:2], generator=seeded(0, 1), **given).images
    first = pipe.scheduler.timesteps[0]
    expected = by_hand.draw(first, WORDS[:2], generator=seeded(0, 1), **given)
    routed = RoutedPipeline(pipe, router, store)
    found = routed(WORDS[:2], generator=seeded(0, 1), **given).images
    assert (found - expected).abs().max() < ROUNDING
    assert (found - dense).abs().max() > 1e-2
    assert routed.store.switches == 3 and routed.store.active == 0  # the first expert, and K - 1 switches
    again = routed(WORDS[:2], generator=seeded(0, 1), **given).images
    assert torch.equal(again, found) and routed.store.switches == 6
    assert torch.equal(routed.unwrapped(WORDS[:2], generator=seeded(0, 1), **given).images, dense)


def test_without_the_callbacks_of_by_hand(tmp_path):
    """PixArt's pipeline gives its timesteps like Stable Diffusion's; its callback is of an older kind."""
    pipe, router = parts(pixart_sigma_pipeline, tmp_path)
    routed = RoutedPipeline(pipe, router)
    routed(WORDS[:2], **{**SIZE, "num_inference_steps": 6}, output_type="latent", use_resolution_binning=False)
    expected = [router.expert_at(float(t) / 1000) for t in pipe.scheduler.timesteps]
    assert routed.transformer.experts_of_calls == expected and set(expected) == {0, 1, 2}


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_other_schedulers_and_guidance(scheduler, tmp_path):
    pipe, router = parts(sd_pipeline, tmp_path)
    pipe.scheduler = scheduler.from_config({**pipe.scheduler.config, "rescale_betas_zero_snr": False})
    routed = RoutedPipeline(pipe, router)
    routed(WORDS[0], **{**SIZE, "num_inference_steps": 8}, output_type="latent", guidance_scale=4.0)
    expected = [router.expert_at(float(t) / 1000) for t in pipe.scheduler.timesteps]
    assert routed.unet.experts_of_calls == expected and len(set(expected)) == 3
    assert routed.statistics().counts == [expected.count(k) for k in range(3)]
    assert routed.statistics().mean_share == pytest.approx(sum(router.shares[k] for k in expected) / len(expected))


@pytest.mark.parametrize(
    ("timesteps", "given", "noise"),
    [
        ([999.0, 500.0, 1.0], [999.0, 500.0, 1.0], [0.999, 0.5, 0.001]),  # the scheduler's own
        ([1000.0, 500.0, 1.0], [1.0, 0.5, 0.001], [1.0, 0.5, 0.001]),  # as a share: FLUX
        ([500.0, 1.0], [500.0, 1.0], [0.5, 0.001]),  # a chain that begins midway
        ([999.0, 1.0, 0.0], [1.0, 0.0], [0.001, 0.0]),  # ... or at its end
        ([999.0, 1.0, 0.0], [0.999, 0.001, 0.0], [0.999, 0.001, 0.0]),
    ],
)
def test_units_of_timesteps(timesteps, given, noise, tmp_path):
    pipe, router = parts(sd_pipeline, tmp_path)
    steps = StepExperts(RoutedPipeline(pipe, router).store, router, pipe.scheduler)
    pipe.scheduler.timesteps = torch.tensor(timesteps)
    assert [steps.noise(value) for value in given] == pytest.approx(noise)


def test_stands_for_the_denoiser(tmp_path):
    pipe, router = parts(sd_pipeline, tmp_path)
    dense = pipe.unet
    routed = RoutedPipeline(pipe, router)
    routed(WORDS[0], **SIZE, output_type="latent")
    steps = routed.unet
    assert isinstance(steps, StepExperts)
    assert steps.config is routed.store.current.config and steps.dtype == torch.float32
    assert steps.conv_in is routed.store.current.conv_in is not None and not list(steps.parameters())
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        steps.nothing  # noqa: B018
    assert routed.device.type == "cpu" and routed.dtype == torch.float32
    assert routed.to(torch.float64).dtype == torch.float64
    assert routed(WORDS[0], **SIZE, output_type="latent").images.dtype == torch.float64
    assert routed.unwrapped.unet is dense and dense.dtype == torch.float64


def test_one_expert_runs_one_timestep(tmp_path):
    pipe, router = parts(sd_pipeline, tmp_path)
    routed = RoutedPipeline(pipe, router)
    with pytest.raises(gp.GenpruneError, match="expert=1 with a router by timestep"):
        routed(WORDS[0], expert=1, **SIZE)
    steps = StepExperts(routed.store, router, pipe.scheduler)
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    with torch.no_grad():
        by_name = steps(sample, timestep=torch.tensor([900, 900]), encoder_hidden_states=text).sample
        assert torch.equal(by_name, steps(sample, 900, text).sample)
        with pytest.raises(gp.GenpruneError, match=r"timesteps \[100, 900\]; expected one for the whole batch"):
            steps(sample, torch.tensor([100, 900]), text)
        with pytest.raises(gp.GenpruneError, match=r"timesteps \[\]; expected one"):
            steps(sample)
