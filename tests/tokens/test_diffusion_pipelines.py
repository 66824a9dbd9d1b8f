"""Tokens of stock pipelines: guidance, saving, adapters, offloading, cut models."""

from __future__ import annotations

import filecmp

import pytest
import tiny_pipelines
import torch
from tiny_hosts import sdxl_unet
from token_denoisers import hooks_on

import genprune as gp
from genprune.families import denoiser
from genprune.tokens.diffusion import DiffusionTokens


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
    "dit": tiny_pipelines.dit_pipeline,
    "pixart": tiny_pipelines.pixart_sigma_pipeline,
    "sd3": tiny_pipelines.sd3_pipeline,
    "flux": tiny_pipelines.flux_pipeline,
}
SIZE = {"height": 16, "width": 32}  # px: 8 x 16 latents
CALLS = {
    "sd": {"prompt": ["a cat", "a dog"], **SIZE},
    "sdxl": {"prompt": ["a cat", "a dog"], **SIZE},
    "dit": {"class_labels": [0, 1]},
    "pixart": {"prompt": ["a cat", "a dog"], **SIZE, "max_sequence_length": 8, "use_resolution_binning": False,
               "clean_caption": False},
    "sd3": {"prompt": ["a cat", "a dog"], "height": 16, "width": 16, "max_sequence_length": 8},
    "flux": {"prompt": ["a cat", "a dog"], **SIZE, "max_sequence_length": 8, "true_cfg_scale": 3.0,
             "negative_prompt": ["b", "b"]},
}  # fmt: skip
ACTS = DiffusionTokens(gp.ZeroTPrune(), tokens=0.5)


def pipeline(family, folder):
    pipe = BUILDERS[family](folder)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser(pipe).parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return pipe


def draw(pipe, family, steps: int = 3):
    options = {"guidance_scale": 4.0} if family != "flux" else {}
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    kind = "latent" if family in ("flux", "sd3") else "np"
    found = pipe(**CALLS[family], **options, num_inference_steps=steps, generator=generators, output_type=kind)
    return torch.as_tensor(found.images)


@pytest.mark.parametrize("family", BUILDERS)
def test_a_stock_pipeline_draws_with_fewer_tokens(family, tmp_path):
    pipe = pipeline(family, tmp_path)
    dense = draw(pipe, family)
    with gp.prune_tokens(pipe, gp.ZeroTPrune(keep=1.0)) as handle:
        assert torch.equal(draw(pipe, family), dense)
        handle.use(ACTS)
        found = draw(pipe, family)
        assert found.shape == dense.shape and torch.isfinite(found).all() and not torch.equal(found, dense)
        assert torch.equal(draw(pipe, family), found), "nothing is left of the last chain"
        handle.set(every=2, early=((0.4, 0.0),))
        assert not torch.equal(draw(pipe, family, steps=4), dense)
    assert torch.equal(draw(pipe, family), dense) and not hooks_on(denoiser(pipe))


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_both_sides_of_guidance_use_one_choice(family, tmp_path):
    """SD calls its U-Net once for both, FLUX its transformer twice."""
    pipe = pipeline(family, tmp_path)
    seen = []
    with gp.prune_tokens(pipe, ACTS) as handle:
        steps = handle._host.steps
        hook = denoiser(pipe).register_forward_hook(
            lambda *_: seen.append([known.choice.kept for known in steps.chosen.values()])
        )
        draw(pipe, family)
        hook.remove()
    if family == "sd":
        assert len(seen) == 3 and all(torch.equal(kept[:2], kept[2:]) for call in seen for kept in call)
    else:
        assert len(seen) == 6
        for first, second in zip(seen[::2], seen[1::2]):
            assert all(a is b for a, b in zip(first, second, strict=True))
    assert not torch.equal(seen[0][0][0], seen[0][0][1]), "pictures have tokens of their own"


@pytest.mark.parametrize("family", ["sd", "dit"])
def test_saving_knows_nothing_of_it(family, tmp_path):
    pipe = pipeline(family, tmp_path)
    pipe.save_pretrained(tmp_path / "dense")
    with gp.prune_tokens(pipe, ACTS):
        pipe.save_pretrained(tmp_path / "reduced")
    for file in (tmp_path / "dense").rglob("*"):
        if file.is_file():
            assert filecmp.cmp(file, tmp_path / "reduced" / file.relative_to(tmp_path / "dense"), shallow=False)


@pytest.mark.parametrize("family", ["sd", "flux"])
@pytest.mark.parametrize("first", ["adapter", "tokens"])
def test_adapters_before_and_after(family, first, tmp_path):
    from peft import LoraConfig

    pipe = pipeline(family, tmp_path)
    model = denoiser(pipe)
    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    handle = gp.prune_tokens(pipe, ACTS) if first == "tokens" else None
    plain = draw(pipe, family)
    torch.manual_seed(5)
    model.add_adapter(config)
    handle = handle or gp.prune_tokens(pipe, ACTS)
    found = draw(pipe, family)
    assert torch.isfinite(found).all() and not torch.equal(found, plain)
    handle.remove()
    assert not torch.equal(draw(pipe, family), found)


@pytest.mark.parametrize("first", ["offload", "tokens"])
def test_offloading_hooks_beside_ours(first, tmp_path):
    """accelerate replaces forward and moves weights; our hooks run around it, whoever came first."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    pipe = pipeline("dit", tmp_path)
    model = denoiser(pipe)
    with gp.prune_tokens(pipe, ACTS):
        expected = draw(pipe, "dit")
    handle = gp.prune_tokens(pipe, ACTS) if first == "tokens" else None
    for block in (model, *model.transformer_blocks):
        add_hook_to_module(block, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    handle = handle or gp.prune_tokens(pipe, ACTS)
    assert torch.equal(draw(pipe, "dit"), expected)
    for block in (model, *model.transformer_blocks):
        remove_hook_from_module(block)
    assert torch.equal(draw(pipe, "dit"), expected)
    handle.remove()
    assert not torch.equal(draw(pipe, "dit"), expected)


@pytest.mark.parametrize("family", ["sd", "flux", "sd3"])
def test_a_cut_pipeline_with_fewer_tokens(family, tmp_path):
    pipe = pipeline(family, tmp_path)
    plan = gp.make_plan(pipe, gp.Random(keep=0.8, of="params"))
    gp.cut(pipe, plan)
    dense = draw(pipe, family)
    with gp.prune_tokens(pipe, ACTS):
        found = draw(pipe, family)
    assert torch.isfinite(found).all() and not torch.equal(found, dense)
