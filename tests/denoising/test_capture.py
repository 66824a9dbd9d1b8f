"""Recording a stock pipeline: the calls are the denoiser's, and the pipeline is as it was."""

from __future__ import annotations

import pytest
import torch

import genprune as gp
from genprune.denoising import capture_runs
from genprune.denoising.calibration import conditions
from genprune.denoising.capture import takes_prompts
from genprune.errors import BadCalibrationData
from genprune.families import denoiser, family_of

SIZE = {"height": 16, "width": 16}


def prompts_for(pipe):
    return ["a cat", "two dogs", "bird"] if takes_prompts(pipe) else None


def runs_of(pipe, **options):
    given = {"samples": 3, "steps": 2, "batch_size": 2} | SIZE | options
    return list(capture_runs(pipe, prompts_for(pipe), **given))


def test_calls_replay_to_the_same_output(pipe):
    runs = runs_of(pipe)
    assert [run.rows for run in runs] == [2, 1] and [run.first_sample for run in runs] == [0, 2]
    model = denoiser(pipe)
    for run in runs:
        assert len(run.calls) == len(run.timesteps) == 2
        assert torch.isfinite(run.latents).all() and run.latents.shape[0] == run.rows
        with torch.no_grad():
            for call in run.calls:
                assert torch.equal(model(**call.inputs, return_dict=False)[0], call.output)


def test_samples_do_not_depend_on_the_batch_size(pipe):
    together, apart = runs_of(pipe, batch_size=3), runs_of(pipe, batch_size=1)
    # Batched kernels reorder sums: float32 noise, grown over the steps.
    torch.testing.assert_close(together[0].latents, torch.cat([run.latents for run in apart]), rtol=1e-3, atol=1e-3)


def test_conditions_drop_the_rows_of_guidance(sd):
    name = family_of(sd.unet).sample_argument
    guided, plain = runs_of(sd, guidance_scale=7.5), runs_of(sd, guidance_scale=1.0)
    assert guided[0].calls[0].inputs[name].shape[0] == 4 and plain[0].calls[0].inputs[name].shape[0] == 2
    for one, other in zip(guided, plain):
        given, expected = conditions(one, name), conditions(other, name)
        torch.testing.assert_close(given["encoder_hidden_states"], expected["encoder_hidden_states"])
        assert given[name].shape[0] == one.rows


def test_the_pipeline_is_untouched(pipe):
    model = denoiser(pipe)
    before = dict(pipe.__dict__), dict(pipe.config), dict(pipe.scheduler.__dict__)
    runs_of(pipe)
    assert dict(pipe.__dict__) == before[0] and dict(pipe.config) == before[1]
    assert pipe.scheduler.__dict__.keys() == before[2].keys()
    assert all(value is before[2][name] for name, value in pipe.scheduler.__dict__.items())
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_hooks_go_when_the_pipeline_fails(sd):
    with pytest.raises(ValueError):
        list(capture_runs(sd, ["a"], height=17, width=16))  # diffusers wants multiples of 8
    assert not sd.unet._forward_hooks


def test_only_wanted_calls_are_kept(sd):
    (run,) = capture_runs(sd, ["a"], steps=3, keep=lambda index: index == 1, **SIZE)
    assert len(run.calls) == 1
    assert int(run.calls[0].timestep) == int(run.timesteps[1])


def test_bad_prompts_are_refused(sd):
    for bad, found in ((None, "got none"), ([], "got none"), ("a cat", "got one string")):
        with pytest.raises(BadCalibrationData, match=f"StableDiffusionPipeline needs calibration prompts, {found}"):
            list(capture_runs(sd, bad))
    with pytest.raises(BadCalibrationData, match=r"prompts\[1\] is ' '; expected a string with text in it"):
        list(capture_runs(sd, ["a", " "]))
    with pytest.raises(BadCalibrationData, match="UNet2DConditionModel is a bare model; expected a pipeline"):
        list(capture_runs(sd.unet, ["a"]))
    assert issubclass(BadCalibrationData, gp.GenpruneError)
