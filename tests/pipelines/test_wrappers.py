"""One-line pipelines for SD, SDXL, SD3 and FLUX: stock classes, the dense one as it was, refusals."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from tiny_hosts import sdxl_unet

sys.path.insert(0, str(Path(__file__).parent.parent / "routers"))

from router_cases import WORDS, small_router  # noqa: E402

import genprune as gp  # noqa: E402
from genprune.cutting import was_cut  # noqa: E402
from genprune.families import denoiser  # noqa: E402
from genprune.tokens.attached import reduced  # noqa: E402
from genprune.tokens.handle import handle_of  # noqa: E402


def sdxl_pipeline(folder):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        vae=tiny_pipelines.vae(),
        text_encoder=tiny_pipelines.clip_text(8),
        tokenizer=tiny_pipelines.clip_tokenizer(folder),
        text_encoder_2=tiny_pipelines.clip_text(16, 16),
        tokenizer_2=tiny_pipelines.clip_tokenizer(folder),
        unet=sdxl_unet().eval(),
        scheduler=EulerDiscreteScheduler(),
    )


BUILDERS = {
    "sd": tiny_pipelines.sd_pipeline,
    "sdxl": sdxl_pipeline,
    "sd3": tiny_pipelines.sd3_pipeline,
    "flux": tiny_pipelines.flux_pipeline,
}
SIZE = {"height": 16, "width": 16}
OPTIONS = {"sd": SIZE, "sdxl": SIZE, "sd3": SIZE | {"max_sequence_length": 8}}
OPTIONS["flux"] = {"height": 16, "width": 32, "max_sequence_length": 8}
FAMILIES = pytest.mark.parametrize("family", BUILDERS)


def pipeline(family, folder):
    pipe = BUILDERS[family](folder)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(1)
    with torch.no_grad():  # what hosts begin at zero
        for parameter in denoiser(pipe).parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return pipe


def drawn(pipe, family, prompts=("a cat", "two dogs")) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    called = pipe(list(prompts), num_inference_steps=2, generator=generators, output_type="latent", **OPTIONS[family])
    return called.images


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for the rounding of other batch sizes and strides."""
    return float((one - other).abs().max()) <= 1e-4 * float(other.abs().max())


@FAMILIES
def test_a_pruned_pipeline_is_of_the_stock_class_and_the_dense_one_stays(family, tmp_path):
    pipe = pipeline(family, tmp_path)
    before, model = drawn(pipe, family), denoiser(pipe)
    small = gp.prune_pipeline(pipe, gp.Magnitude(keep=0.7, of="units"))
    assert type(small) is type(pipe) and was_cut(denoiser(small)) and isinstance(denoiser(small), type(model))
    assert denoiser(pipe) is model and not was_cut(model)
    assert torch.equal(drawn(pipe, family), before) and not torch.allclose(drawn(small, family), before)
    assert small.vae is pipe.vae  # the rest is shared
    small.save_pretrained(tmp_path / "small")
    again = gp.load_pipeline(tmp_path / "small")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(drawn(again, family), drawn(small, family))


def test_a_folder_with_a_plan_is_cut_while_it_is_read(tmp_path):
    pipe = pipeline("sd", tmp_path)
    pipe.save_pretrained(tmp_path / "base")
    plan = gp.make_plan(pipe, gp.Magnitude(keep=0.7, of="macs"))
    expected = gp.prune_pipeline(pipe, plan)
    plan.save(tmp_path / "plan")
    for how in (plan, tmp_path / "plan", gp.Magnitude(keep=0.7, of="macs")):
        found = gp.prune_pipeline(tmp_path / "base", how)
        found.set_progress_bar_config(disable=True)
        assert torch.equal(drawn(found, "sd"), drawn(expected, "sd"))
    half = gp.prune_pipeline(tmp_path / "base", plan, torch_dtype=torch.bfloat16)
    assert half.unet.dtype == torch.bfloat16


def test_a_folder_is_loaded_as_asked_and_routed(tmp_path):
    pipe = tiny_pipelines.sd_pipeline(tmp_path)
    small_router(pipe, 2).save_pretrained(tmp_path / "router")
    pipe.save_pretrained(tmp_path / "dense")
    routed = gp.route_pipeline(tmp_path / "dense", tmp_path / "router", torch_dtype=torch.bfloat16, resident=2)
    assert routed.unwrapped.unet.dtype is torch.bfloat16 and routed.settings.resident == 2
    with pytest.raises(gp.GenpruneError, match="'stores' is no setting of a routed pipeline, nearest name: 'store'"):
        gp.route_pipeline(pipe, small_router(pipe, 2), stores="materialised")


@pytest.mark.parametrize("from_folder", [False, True])
def test_recovery_trains_what_is_left_and_not_the_teacher(tmp_path, from_folder):
    pipe = pipeline("sd", tmp_path)
    pipe.save_pretrained(tmp_path / "base")
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    settings = gp.NormalizedDistillation(steps=2, batch_size=2, learning_rate=1e-3, teacher_steps=1)
    how = gp.Taylor(keep=0.7, of="macs")
    small = gp.prune_pipeline(
        tmp_path / "base" if from_folder else pipe,
        how,
        prompts=["a cat", "two dogs"],
        recover=settings,
        output_dir=tmp_path / "out",
        pipeline_options=SIZE,
        progress=False,
    )
    assert (tmp_path / "out" / "recovery" / "checkpoint-000002").is_dir()
    assert not (tmp_path / "out" / "masks").exists()
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    plain = gp.prune_pipeline(pipe, gp.applied_plan(small.unet))
    assert not torch.equal(drawn(plain, "sd"), drawn(small, "sd"))


def test_what_cannot_be_pruned_is_refused(tmp_path):
    pipe = pipeline("sd", tmp_path)
    with pytest.raises(gp.GenpruneError, match="got 0.7; expected a method such as gp.Taylor"):
        gp.prune_pipeline(pipe, 0.7)
    with pytest.raises(
        gp.GenpruneError, match="torch_dtype belong to loading, and a StableDiffusionPipeline is given"
    ):
        gp.prune_pipeline(pipe, gp.Magnitude(), torch_dtype=torch.float16)
    with pytest.raises(gp.UnsupportedModel, match="UNet2DConditionModel is no pipeline"):
        gp.prune_pipeline(pipe.unet, gp.Magnitude())
    with pytest.raises(gp.PlanMismatch, match="no plan at"):
        gp.prune_pipeline(pipe, tmp_path / "nowhere")
    assert not was_cut(pipe.unet)


@FAMILIES
def test_a_routed_pipeline_in_one_line(family, tmp_path):
    pipe = pipeline(family, tmp_path)
    router = small_router(pipe, 2)
    router.save_pretrained(tmp_path / "router")
    by_object, by_folder = gp.route_pipeline(pipe, router), None
    experts = router.route(WORDS[:4]).experts
    pictures = drawn(by_object, family, WORDS[:4])
    by_object.save_pretrained(tmp_path / "routed")
    del by_object
    by_folder = gp.load_pipeline(tmp_path / "routed")
    assert type(by_folder).__name__ == "RoutedPipeline"
    by_folder.set_progress_bar_config(disable=True)
    assert torch.equal(drawn(by_folder, family, WORDS[:4]), pictures)
    materialised = gp.route_pipeline(pipeline(family, tmp_path), tmp_path / "router", store="materialised")
    assert close(drawn(materialised, family, WORDS[:4]), pictures)
    alone = gp.prune_pipeline(pipeline(family, tmp_path), router.plans[experts[0]])
    generator = [torch.Generator().manual_seed(0)]
    one = alone(WORDS[0], num_inference_steps=2, generator=generator, output_type="latent", **OPTIONS[family]).images
    assert close(one[0], pictures[0])
    with pytest.raises(gp.PlanMismatch, match="is a routed pipeline, whose experts have plans"):
        gp.load_pipeline(tmp_path / "routed", router.plans[0])
    with pytest.raises(gp.UnsupportedModel, match="expert_pipeline"):
        gp.accelerate_pipeline(by_folder, tokens=0.5)


@FAMILIES
def test_fewer_tokens_in_one_line_and_back(family, tmp_path):
    pipe = pipeline(family, tmp_path)
    before = drawn(pipe, family)
    assert gp.accelerate_pipeline(pipe, tokens=0.5) is pipe and reduced(denoiser(pipe))
    assert not torch.allclose(drawn(pipe, family), before)
    handle_of(denoiser(pipe)).remove()
    assert torch.equal(drawn(pipe, family), before)
    small = gp.accelerate_pipeline(gp.prune_pipeline(pipe, gp.Magnitude(keep=0.8, of="units")), tokens=0.5)
    assert drawn(small, family).shape == before.shape and not reduced(denoiser(pipe))


def test_settings_of_prune_tokens_pass(tmp_path):
    pipe = pipeline("sd", tmp_path)
    settings = gp.DiffusionTokens(gp.ToMe(keep=0.95), restore="nearest")
    gp.accelerate_pipeline(pipe, tokens=settings)
    assert handle_of(pipe.unet).report().keep == pytest.approx(0.95, abs=0.03)


def test_the_cache_of_diffusers_in_one_line_and_back(tmp_path):
    from diffusers import FirstBlockCacheConfig

    pipe = pipeline("flux", tmp_path)
    before = drawn(pipe, "flux")
    gp.accelerate_pipeline(pipe, cache=10.0)
    assert not torch.allclose(drawn(pipe, "flux"), before)
    with pytest.raises(gp.GenpruneError, match="diffusers refuses this cache .*already been enabled"):
        gp.accelerate_pipeline(pipe, cache=FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(gp.GenpruneError, match="tokens and a cache on one denoiser"):
        gp.accelerate_pipeline(pipe, tokens=0.5)
    pipe.transformer.disable_cache()
    assert torch.equal(drawn(pipe, "flux"), before)
    gp.accelerate_pipeline(pipe, tokens=0.5)
    with pytest.raises(gp.GenpruneError, match="tokens and a cache on one denoiser"):
        gp.accelerate_pipeline(pipe, cache=0.1)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({}, gp.GenpruneError, "neither tokens nor cache is given"),
        ({"tokens": 0.5, "cache": 0.1}, gp.GenpruneError, "tokens and a cache on one denoiser"),
        ({"cache": 0.1}, gp.UnsupportedModel, "UNet2DConditionModel has no cache"),
        ({"tokens": 1.5}, gp.GenpruneError, "tokens=1.5"),
        ({"tokens": "fast"}, gp.GenpruneError, "fast"),
    ],
)
def test_what_cannot_be_accelerated_is_refused(tmp_path, given, error, words):
    pipe = pipeline("sd", tmp_path)
    with pytest.raises(error, match=words):
        gp.accelerate_pipeline(pipe, **given)
    assert not reduced(pipe.unet)


def test_a_bad_cache_is_refused(tmp_path):
    pipe = pipeline("flux", tmp_path)
    for cache, words in ((0.0, "expected a threshold above 0"), ("first", "diffusers refuses this cache")):
        with pytest.raises(gp.GenpruneError, match=words):
            gp.accelerate_pipeline(pipe, cache=cache)
    assert not pipe.transformer.is_cache_enabled
