"""Input moments against naive float64 sums; recorded trajectories play again; weights of steps as published."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_hosts import sd_unet, vit
from tiny_pipelines import sd_pipeline
from torch import nn

import genprune as gp
from genprune.denoising.activations import consumers, input_moments, packages, taps, weight_matrix
from genprune.denoising.replay import ModelCall, recorded_calls, step_weights
from genprune.errors import BadCalibrationData, UnsupportedModel

SIZE = {"height": 16, "width": 16}


class Two(nn.Module):
    """A linear layer of joint inputs and a convolution with stride, padding and dilation."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.conv = nn.Conv2d(2, 5, 3, stride=2, padding=2, dilation=2)
        self.idle = nn.Linear(2, 2)

    def forward(self, tokens, image):
        return self.linear(tokens), self.conv(image)


def calls_of(count=3):
    torch.manual_seed(0)
    make = lambda i: {"tokens": torch.randn(2, 4 + i, 3) + 1, "image": torch.randn(3, 2, 7, 6)}  # noqa: E731
    return [ModelCall(make(i), weight=1.0 + i) for i in range(count)]


def naive_linear(calls):
    second, first, total = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0.0
    for call in calls:
        for row in call.inputs["tokens"].reshape(-1, 3).double():
            second += call.weight * torch.outer(row, row)
            first += call.weight * row
            total += call.weight
    return second / total, first / total


@pytest.mark.parametrize("modules_per_pass", [None, 1])
def test_moments_equal_naive_sums(modules_per_pass):
    torch.manual_seed(0)
    model, calls = Two().eval(), calls_of()
    found = dict(input_moments(model, ["linear", "conv"], calls, modules_per_pass))
    second, mean = naive_linear(calls)
    torch.testing.assert_close(found["linear"].second, second, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found["linear"].mean, mean, rtol=1e-6, atol=1e-7)
    assert found["linear"].positions == 2 * (4 + 5 + 6)
    torch.testing.assert_close(found["linear"].covariance, second - torch.outer(mean, mean), rtol=1e-5, atol=1e-6)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_convolutions_features_are_what_its_weight_multiplies():
    """tr(W H W^T) is the mean squared output less bias: order, stride and padding of the unfolding are right."""
    torch.manual_seed(0)
    model, calls = Two().eval(), calls_of()
    moments = dict(input_moments(model, ["conv"], calls))["conv"]
    weight = weight_matrix(model.conv)
    assert taps(model.conv) == 9 and weight.shape == (5, 18)
    energy, total = 0.0, 0.0
    with torch.no_grad():
        for call in calls:
            output = model.conv(call.inputs["image"]) - model.conv.bias[:, None, None]
            energy += call.weight * float(output.double().square().sum())
            total += call.weight * output[:, 0].numel()
    assert float(((weight @ moments.second) * weight).sum()) == pytest.approx(energy / total, rel=1e-5)


def test_layers_that_cannot_be_measured_are_refused():
    model = Two().eval()
    with pytest.raises(BadCalibrationData, match="'idle' never ran on the calibration data; expected every layer"):
        list(input_moments(model, ["idle"], calls_of()))
    model.grouped = nn.Conv2d(4, 4, 3, groups=2)
    with pytest.raises(UnsupportedModel, match="'grouped' is a Conv2d .*; expected a plain Linear or an ungrouped"):
        list(input_moments(model, ["grouped"], calls_of()))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_packages_bound_memory(monkeypatch):
    model = Two()
    paths = ["linear", "conv", "idle"]
    assert packages(model, paths) == [paths]
    assert packages(model, paths, 2) == [["linear", "conv"], ["idle"]]
    monkeypatch.setattr("genprune.denoising.activations.PACKAGE_BYTES", 8 * 18**2)
    assert packages(model, paths) == [["linear"], ["conv"], ["idle"]]


def test_consumers_of_each_host():
    unet = consumers(gp.find_sites(sd_unet()))
    assert {path.rsplit(".", 2)[-1] for path in unet} == {"conv2", "0", "2"}
    assert list(consumers(gp.find_sites(vit())))[:2] == ["blocks.0.attn.proj", "blocks.0.mlp.fc2"]
    from tiny_hosts import flux

    found = consumers(gp.find_sites(flux()))
    assert {site.kind for site, _ in found["single_transformer_blocks.0.proj_out"]} == {"heads", "neurons"}
    assert {"transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.attn.to_add_out"} <= found.keys()


def test_step_weights_are_the_published_ones():
    weights = step_weights(25)
    assert weights[0] == pytest.approx(1.2) and weights[-1] == pytest.approx(0.8)
    assert weights[9] == pytest.approx(0.8 + 0.4 * math.log(25 - 10 + 1) / math.log(25))
    assert list(weights) == sorted(weights, reverse=True) and step_weights(1) == (1.2,)


def test_a_recorded_trajectory_plays_the_same_calls_again(tmp_path):
    pipe = sd_pipeline(tmp_path)
    options = {"steps": 4, "batch_size": 2, "guidance_scale": 3.0, **SIZE}
    calls = recorded_calls(pipe, ["a cat", "two dogs", "bird"], **options)
    assert [round(call.weight, 6) for call in calls] == [round(w, 6) for w in step_weights(4)] * 2
    assert calls[0].inputs["sample"].shape[0] == 4 and calls[-1].inputs["sample"].shape[0] == 2
    assert calls[0].inputs["encoder_hidden_states"] is calls[3].inputs["encoder_hidden_states"]
    seen = []
    handle = pipe.unet.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with torch.no_grad():
        calls[2].play(pipe.unet)
    handle.remove()
    assert seen[0].shape == calls[2].inputs["sample"].shape
    few = recorded_calls(pipe, ["a cat"], timesteps=2, **options)
    assert [call.weight for call in few] == [step_weights(4)[1], step_weights(4)[3]]


def test_batches_of_a_bare_model():
    model = vit().eval()
    images = torch.randn(2, 3, 32, 32)
    for data in ([images], [(images, torch.tensor([0, 1]))], [{"x": images}]):
        (call,) = recorded_calls(model, data=data)
        assert call.weight == 1.0
        call.play(model)
    (call,) = recorded_calls(model, data=["anything"], loss_fn=lambda m, batch: m(images))
    call.play(model)


def test_bad_data_is_refused(tmp_path):
    with pytest.raises(BadCalibrationData, match="VisionTransformer is a bare model and got no data. Pass data="):
        recorded_calls(vit())
    with pytest.raises(BadCalibrationData, match="data holds no batch; expected at least one"):
        recorded_calls(vit(), data=[])
    with pytest.raises(BadCalibrationData, match="batch 1 is a str that genprune cannot read"):
        recorded_calls(vit(), data=["a"])
    pipe = sd_pipeline(tmp_path)
    with pytest.raises(BadCalibrationData, match="needs calibration prompts, got none"):
        recorded_calls(pipe)
    with pytest.raises(
        BadCalibrationData, match="got data or a loss for a StableDiffusionPipeline.* expected prompts"
    ):
        recorded_calls(pipe, ["a"], data=[1])
