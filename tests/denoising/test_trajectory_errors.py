"""What a chain refuses, and what it says."""

from __future__ import annotations

import pytest
import torch
from chain_cases import CASES, NoisyGates, drawn
from diffusers import DDIMScheduler

from genprune.denoising import draw_latents
from genprune.errors import BadCalibrationData, GenpruneError


@pytest.fixture
def sd(tmp_path):
    return CASES["ddim"].build(tmp_path)


def refused(pipe, message: str, *prompts, error=GenpruneError, seeds=(0,), **options):
    with pytest.raises(error, match=message):
        draw_latents(pipe, *prompts, seeds=seeds, **options)


def test_options_are_checked(sd):
    refused(sd, "has no option 'guidance', nearest name: 'guidance_scale'; expected one of", ["a"], guidance=2.0)
    refused(sd, r"generator is not an option of draw_latents\. Pass seeds=", ["a"], generator=None)
    refused(sd, "output_type is not an option of draw_latents. The final latents", ["a"], output_type="pil")
    refused(sd, "2 prompts for 1 seeds; expected one for each", ["a", "b"])
    refused(sd, r"seeds is \[\]; expected at least one integer", ["a"], seeds=[])
    refused(sd, r"seeds is \[0.5\]; expected at least one integer", ["a"], seeds=[0.5])
    refused(sd, "needs calibration prompts, got none", error=BadCalibrationData)
    refused(sd.unet, "UNet2DConditionModel is a bare model; expected a pipeline that can draw")
    refused(
        sd,
        "block_checkpointing needs calls that are made again",
        ["a"],
        block_checkpointing=True,
        activation_memory=None,
    )


def test_options_of_pipelines_without_prompts(tmp_path):
    refused(CASES["unconditional ddpm"].build(tmp_path), "DDPMPipeline takes no prompts, got 1", ["a"])
    dit = CASES["dit"].build(tmp_path)
    refused(dit, "DiTPipeline needs class_labels, which was not given. Pass class_labels=")
    refused(dit, "2 class_labels for 1 seeds", class_labels=[0, 1])


def test_latents_that_are_not_finite_name_the_step(sd):
    class Broken(NoisyGates):
        def value(self, logit, drawn):
            return torch.full_like(logit, torch.nan if self.steps_set[-1] == 1 else 1.0) * logit

    with Broken(sd) as gates:
        with pytest.raises(GenpruneError, match=r"NaN or infinite after step 2 of 3 \(DDIMScheduler, torch.float32\)"):
            drawn(sd, CASES["ddim"], gates=gates)
    assert all(p.requires_grad for p in sd.unet.parameters()) and torch.is_grad_enabled()
    assert "step" not in vars(sd.scheduler)


class NoGradStep(DDIMScheduler):
    @torch.no_grad()
    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)


class DetachedPrediction(DDIMScheduler):
    def step(self, model_output, timestep, sample, **kwargs):
        return super().step(model_output.detach(), timestep, sample + 0 * model_output.sum().detach(), **kwargs)


@pytest.mark.parametrize("solver", [NoGradStep, DetachedPrediction])
@pytest.mark.parametrize("activation_memory", ["one call", None])
def test_a_solver_that_breaks_the_graph(sd, solver, activation_memory):
    sd.scheduler = solver.from_config(sd.scheduler.config)
    with NoisyGates(sd) as gates:
        message = (
            f"{solver.__name__} breaks the graph: the latents after step 1 .* such as DDIMScheduler, or FlowMatch"
        )
        with pytest.raises(GenpruneError, match=message):
            drawn(sd, CASES["ddim"], gates=gates, activation_memory=activation_memory)


def test_gates_that_are_not_attached(sd):
    gates = NoisyGates(sd)
    gates.handle.remove()
    with pytest.raises(
        GenpruneError, match=r"do not depend on gates\.parameters\(\); expected gates attached to pipe.unet"
    ):
        drawn(sd, CASES["ddim"], gates=gates, activation_memory=None)
    with pytest.raises(GenpruneError, match=r"no call of UNet2DConditionModel depends on gates\.parameters\(\)"):
        drawn(sd, CASES["ddim"], gates=gates).square().mean().backward()


def test_gates_that_draw_again_are_caught(sd):
    """Pitfall 6, in gates of a user's own: the gradient would be that of other gates."""

    class Forgetful(NoisyGates):
        def value(self, logit, drawn):
            return torch.sigmoid(logit + torch.randn(logit.shape))

    with Forgetful(sd) as gates:
        loss = drawn(sd, CASES["ddim"], gates=gates).square().mean()
        with pytest.raises(
            GenpruneError, match=r"call 2 gave another output .* Make set_step\(2\) set the same values"
        ):
            loss.backward()
    assert all(p.requires_grad for p in sd.unet.parameters())


def test_logits_that_change_before_backward_are_caught(sd):
    with NoisyGates(sd) as gates:
        loss = drawn(sd, CASES["ddim"], gates=gates).square().mean()
        with torch.no_grad():
            gates.logits[0].add_(1)
        with pytest.raises(GenpruneError, match=r"changed in place .* Call backward\(\) before optimizer.step\(\)"):
            loss.backward()


def test_dropout_is_refused(sd):
    sd.unet.train()
    next(module for module in sd.unet.modules() if isinstance(module, torch.nn.Dropout)).p = 0.1
    with NoisyGates(sd) as gates:
        with pytest.raises(GenpruneError, match=r"drops at random \(p = 0.1\).* Call pipe.unet.eval\(\) first"):
            drawn(sd, CASES["ddim"], gates=gates)
        assert drawn(sd, CASES["ddim"]).isfinite().all()  # without a gradient nothing is made again


def test_a_cache_of_steps_is_refused(tmp_path):
    from diffusers import FirstBlockCacheConfig

    pipe = CASES["flux"].build(tmp_path)
    with NoisyGates(pipe) as gates:
        pipe.transformer.enable_cache(FirstBlockCacheConfig())
        with pytest.raises(GenpruneError, match=r"Call pipe.transformer.disable_cache\(\) first"):
            drawn(pipe, CASES["flux"], gates=gates)
        pipe.transformer.disable_cache()
