"""Noised inputs and targets against diffusers' own schedulers."""

from __future__ import annotations

import pytest
import torch

from genprune.denoising.targets import DiffusionProcess, FlowProcess, forward_process, noise_for, spread_timesteps
from genprune.errors import BadCalibrationData


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_equals_ddpm(prediction, zero_snr):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(prediction_type=prediction, rescale_betas_zero_snr=zero_snr)
    process = forward_process(scheduler)
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    for t in (0, 500, 999):
        steps = torch.full((2,), t)
        sample, target = process.noised(clean, noise, t)
        torch.testing.assert_close(sample, scheduler.add_noise(clean, noise, steps))
        velocity = scheduler.get_velocity(clean, noise, steps)
        torch.testing.assert_close(target, {"epsilon": noise, "v_prediction": velocity, "sample": clean}[prediction])


def test_equals_flow_matching():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    process = forward_process(scheduler)
    assert isinstance(process, FlowProcess)
    torch.manual_seed(0)
    clean, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    for index in (0, 400, 999):
        t = scheduler.timesteps[index]
        sample, target = process.noised(clean, noise, float(t))
        torch.testing.assert_close(sample, scheduler.scale_noise(clean, t[None], noise))
        torch.testing.assert_close(target, noise - clean)


def test_a_scheduler_that_steps_from_noise_with_the_target_returns_the_clean_sample():
    from diffusers import DDIMScheduler

    for prediction in ("epsilon", "v_prediction", "sample"):
        scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
        scheduler.set_timesteps(10)
        torch.manual_seed(0)
        clean, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
        sample, target = forward_process(scheduler).noised(clean, noise, 500)
        found = scheduler.step(target, 500, sample).pred_original_sample
        torch.testing.assert_close(found, clean, rtol=1e-4, atol=1e-4)


def test_schedulers_share_a_process():
    from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler

    for scheduler in (DPMSolverMultistepScheduler(), EulerDiscreteScheduler(), PNDMScheduler()):
        process = forward_process(scheduler)
        assert isinstance(process, DiffusionProcess) and process.prediction_type == "epsilon"
        assert process.train_timesteps == 1000
    assert isinstance(
        forward_process(DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)),
        FlowProcess,
    )


def test_unknown_processes_are_refused():
    from diffusers import KarrasVeScheduler

    with pytest.raises(
        BadCalibrationData, match="KarrasVeScheduler .* no forward process that genprune knows; expect"
    ):
        forward_process(KarrasVeScheduler())


def test_timesteps_and_noise():
    assert spread_timesteps(4, 1000) == (125, 375, 625, 875)
    assert spread_timesteps(1, 100) == (50,)
    whole = noise_for(torch.empty(4, 2, 3, 3), seed=1, first_sample=0, timestep=10)
    tail = noise_for(torch.empty(2, 2, 3, 3), seed=1, first_sample=2, timestep=10)
    assert torch.equal(whole[2:], tail)
    assert not torch.equal(whole, noise_for(torch.empty(4, 2, 3, 3), seed=1, first_sample=0, timestep=11))
    assert not torch.equal(whole, noise_for(torch.empty(4, 2, 3, 3), seed=2, first_sample=0, timestep=10))
    assert len({float(row.sum()) for row in whole}) == 4
