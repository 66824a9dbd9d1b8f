"""Calibration batches: reproducible, on any pipeline, from drawn or given data."""

from __future__ import annotations

import pytest
import torch
from tiny_hosts import vit

from genprune.denoising import DenoisingBatch, ImageBatch, LossBatch, calibration_batches
from genprune.denoising.capture import takes_prompts
from genprune.errors import BadCalibrationData
from genprune.families import denoiser

SIZE = {"height": 16, "width": 16}


def batches_of(pipe, prompts=("a cat", "two dogs"), **options):
    prompts = list(prompts) if takes_prompts(pipe) else None
    given = {"timesteps": 2, "samples": 2, "steps": 2, "batch_size": 2} | SIZE | options
    return list(calibration_batches(pipe, prompts, **given))


def test_batches_run_through_the_denoiser(pipe):
    batches = batches_of(pipe)
    train = pipe.scheduler.config.num_train_timesteps
    assert [batch.timestep for batch in batches] == [train / 4, 3 * train / 4]
    for batch in batches:
        with torch.no_grad():
            losses = batch.losses(denoiser(pipe))
        assert losses.shape == (2,) and torch.isfinite(losses).all() and (losses > 0).all()


def test_the_same_seed_gives_the_same_batches(pipe):
    first, second, other = batches_of(pipe), batches_of(pipe), batches_of(pipe, seed=1)
    for one, two, three in zip(first, second, other):
        assert torch.equal(one.target, two.target) and not torch.equal(one.target, three.target)
        for name, value in one.inputs.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, two.inputs[name])


def test_flux_takes_its_timesteps_as_shares(tmp_path):
    from tiny_pipelines import flux_pipeline, sd3_pipeline

    flux = batches_of(flux_pipeline(tmp_path))[0]
    assert flux.inputs["timestep"].tolist() == pytest.approx([0.25, 0.25])
    sd3 = batches_of(sd3_pipeline(tmp_path))[0]
    assert sd3.inputs["timestep"].tolist() == [250.0, 250.0]


def test_given_latents_and_images(sd):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    (batch,) = batches_of(sd, data=latents, timesteps=(0,))
    # v = sqrt(a) noise - sqrt(1 - a) clean, and x = sqrt(a) clean + sqrt(1 - a) noise
    alpha = sd.scheduler.alphas_cumprod[0]
    clean = alpha.sqrt() * batch.inputs["sample"] - (1 - alpha).sqrt() * batch.target
    torch.testing.assert_close(clean, latents, rtol=1e-4, atol=1e-4)

    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    (batch,) = batches_of(sd, data=images, timesteps=(0,))
    with torch.no_grad():
        encoded = sd.vae.encode(images * 2 - 1).latent_dist.mode() * sd.vae.config.scaling_factor
    clean = alpha.sqrt() * batch.inputs["sample"] - (1 - alpha).sqrt() * batch.target
    torch.testing.assert_close(clean, encoded, rtol=1e-3, atol=1e-3)

    from PIL import Image

    pictures = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    assert batches_of(sd, data=pictures, timesteps=(0,))[0].target.shape == (2, 4, 8, 8)


def test_given_latents_are_packed_for_flux(tmp_path):
    from tiny_pipelines import flux_pipeline

    (batch,) = batches_of(flux_pipeline(tmp_path), data=torch.randn(2, 4, 8, 8), timesteps=(500,))
    assert batch.target.shape == (2, 16, 16)


def test_own_batches_of_a_bare_model(sd):
    model = vit()
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    (batch,) = calibration_batches(model, data=[(images, labels)])
    assert isinstance(batch, ImageBatch) and batch.losses(model).shape == (2,)
    (batch,) = calibration_batches(model, data=[images], loss_fn=lambda m, x: m(x).square().mean())
    assert isinstance(batch, LossBatch) and batch.losses(model).shape == (1,)
    inputs = {"sample": torch.randn(1, 4, 8, 8), "timestep": 300, "encoder_hidden_states": torch.randn(1, 5, 24)}
    (batch,) = calibration_batches(sd.unet, data=[(inputs, torch.randn(1, 4, 8, 8))])
    assert isinstance(batch, DenoisingBatch) and batch.timestep == 300 and batch.losses(sd.unet).shape == (1,)


def test_bad_data_is_refused(sd):
    def refused(match, *args, **options):
        with pytest.raises(BadCalibrationData, match=match):
            list(calibration_batches(*args, **options))

    refused("VisionTransformer is a bare model and got no data. Pass data=", vit())
    refused("data holds no batch; expected at least one", vit(), data=[])
    refused("batch 1 is a int that genprune cannot read", vit(), data=[3])
    images = torch.randn(2, 3, 32, 32)
    refused(r"labels \(3,\); expected one label per image, \(2,\)", vit(), data=[(images, torch.zeros(3))])
    refused("timestep 1000 is outside the training range 0 ... 999", sd, ["a"], timesteps=(1000,))
    latents = torch.randn(2, 4, 8, 8)
    refused("1 prompts for 2 latents or images; expected one prompt for each", sd, ["a"], latents)
    refused(r"data is torch.float32 of shape \(4, 8, 8\); expected latents", sd, ["a"], latents[0])
    refused(r"values from .* expected latents .*The VAE has 4 latent channels", sd, ["a"], torch.randn(1, 3, 16, 16))
    refused("data is int; expected latents", sd, ["a"], 3)
