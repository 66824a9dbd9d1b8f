"""Drawing runs: seeds by global index, shares, resuming, refusing other runs."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny_pipelines import ddpm_pipeline, flux_pipeline, sd3_pipeline

from genprune.bench import (
    BadCandidate,
    RunMismatch,
    Sampling,
    compare_speed,
    draw_images,
    image_seed,
    load_image,
)
from genprune.bench.run import load_latent

PROMPTS = ["a cat", "two dogs", "a red car", "a frog", "an apple", "a star", "a cat"]  # one twice: seeds must differ
SAMPLING = Sampling(num_inference_steps=2, guidance_scale=3.0, batch_size=2)


def images(folder, count: int = len(PROMPTS)) -> torch.Tensor:
    return torch.stack([load_image(folder, index) for index in range(count)])


@pytest.fixture(scope="module")
def drawn(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    assert draw_images(pipeline, PROMPTS, SAMPLING, folder, progress=False) == len(PROMPTS)
    return folder


def test_every_image_has_its_own_prompt_and_seed(drawn):
    drawn = images(drawn).double()
    assert drawn.shape == (7, 3, 32, 32)
    for i in range(7):
        for j in range(i):
            assert (drawn[i] - drawn[j]).abs().mean() > 5  # levels of 255


def test_seed_is_a_function_of_run_seed_and_index_alone():
    seeds = {image_seed(seed, index) for seed in range(20) for index in range(50)}
    assert len(seeds) == 1000 and max(seeds) < 2**63
    assert image_seed(3, 4) == image_seed(3, 4) != image_seed(4, 3)


def test_an_image_is_what_the_pipeline_draws_alone_with_that_seed(pipeline, drawn):
    generator = torch.Generator().manual_seed(image_seed(0, 5))
    alone = pipeline(PROMPTS[5], num_inference_steps=2, guidance_scale=3.0, generator=generator, output_type="pt")
    # in a batch of two instead of one: float noise, at most one of 255 levels after rounding
    assert ((alone.images[0] * 255).round() - load_image(drawn, 5).float()).abs().max() <= 1


@pytest.mark.parametrize("processes", [2, 3])
def test_the_number_of_processes_changes_no_pixel(pipeline, drawn, tmp_path, processes):
    counts = [
        draw_images(pipeline, PROMPTS, SAMPLING, tmp_path, process_index=i, process_count=processes, progress=False)
        for i in range(processes)
    ]
    assert sum(counts) == 7 and max(counts) < 7
    assert torch.equal(images(tmp_path), images(drawn))
    assert torch.equal(load_latent(tmp_path, 6), load_latent(drawn, 6))


def test_latents_are_the_final_ones(pipeline, drawn):
    latent = load_latent(drawn, 3)[None]
    with torch.no_grad():
        decoded = pipeline.vae.decode(latent / pipeline.vae.config.scaling_factor).sample
    levels = ((decoded[0] / 2 + 0.5).clamp(0, 1) * 255).round()
    assert (levels - load_image(drawn, 3).float()).abs().max() <= 1


def test_resumes_without_drawing_again(pipeline, drawn, tmp_path):
    draw_images(pipeline, PROMPTS, SAMPLING, tmp_path, progress=False)
    kept = (tmp_path / "00002.png").stat().st_mtime_ns
    (tmp_path / "00003.png").unlink()  # lost
    (tmp_path / "00004.png").write_bytes((tmp_path / "00004.png").read_bytes()[:200])  # cut short
    (tmp_path / "00006.latent.safetensors").unlink()
    assert draw_images(pipeline, PROMPTS, SAMPLING, tmp_path, progress=False) == 3
    assert torch.equal(images(tmp_path), images(drawn))
    assert (tmp_path / "00002.png").stat().st_mtime_ns == kept
    assert draw_images(pipeline, PROMPTS, SAMPLING, tmp_path, progress=False) == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda run: run.update(prompts=PROMPTS[::-1]), "prompts"),
        (lambda run: run.update(sampling=Sampling(num_inference_steps=3, guidance_scale=3.0)), "sampling"),
        (lambda run: run["pipeline"].unet.conv_in.weight.data.mul_(2), "weights"),
    ],
)
def test_never_mixes_two_runs(pipeline, tmp_path, change, named):
    run = {"pipeline": copy.deepcopy(pipeline), "prompts": PROMPTS[:1], "sampling": SAMPLING}
    draw_images(**run, folder=tmp_path, progress=False)
    before = (tmp_path / "00000.png").read_bytes()
    change(run)
    with pytest.raises(RunMismatch, match=rf"images of another run \(differing: .*{named}.*Choose another output"):
        draw_images(**run, folder=tmp_path, progress=False)
    assert (tmp_path / "00000.png").read_bytes() == before


def test_refuses_pictures_of_unknown_origin(pipeline, drawn, tmp_path):
    (tmp_path / "00000.png").write_bytes((drawn / "00000.png").read_bytes())
    with pytest.raises(RunMismatch, match="pictures but no run.json"):
        draw_images(pipeline, PROMPTS, SAMPLING, tmp_path, progress=False)


@pytest.mark.parametrize("build", [flux_pipeline, sd3_pipeline], ids=["flux", "sd3"])
def test_transformer_pipelines_draw_alike(build, tmp_path):
    (tmp_path / "words").mkdir()
    pipeline = build(tmp_path / "words")
    pipeline.vae.register_to_config(shift_factor=0.1)  # as their real autoencoders have
    pipeline.set_progress_bar_config(disable=True)
    sampling = Sampling(num_inference_steps=2, guidance_scale=2.0, batch_size=2, height=16, width=16)
    draw_images(pipeline, PROMPTS[:3], sampling, tmp_path / "one", progress=False)
    for process in range(2):
        draw_images(
            pipeline,
            PROMPTS[:3],
            sampling,
            tmp_path / "two",
            process_index=process,
            process_count=2,
            progress=False,
        )
    assert torch.equal(images(tmp_path / "one", 3), images(tmp_path / "two", 3))
    assert load_image(tmp_path / "one", 0).shape == (3, 16, 16)
    latents = torch.stack([load_latent(tmp_path / "one", index) for index in range(3)])
    assert (latents[0] - latents[1]).abs().mean() > 0.1 and torch.isfinite(latents).all()
    speed = compare_speed({"a": pipeline, "b": pipeline}, "a", "a cat", sampling, rounds=2)
    assert speed["denoiser"].median_ms["b"] > 0


def test_needs_a_prompt(tmp_path):
    with pytest.raises(BadCandidate, match="DDPMPipeline takes no prompt, expected a text-to-image pipeline"):
        draw_images(ddpm_pipeline(), PROMPTS, SAMPLING, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_leaves_the_pipeline_as_it_was(pipeline, tmp_path):
    pipeline.set_progress_bar_config(desc="mine", disable=True)
    before = dict(pipeline._progress_bar_config)
    draw_images(pipeline, PROMPTS[:1], SAMPLING, tmp_path, progress=False)
    assert pipeline._progress_bar_config == before
    assert not pipeline.unet._forward_hooks and not pipeline.unet._forward_pre_hooks


def test_a_killed_run_leaves_whole_pictures_only(folders, drawn, tmp_path):
    program = f"""
from diffusers import StableDiffusionPipeline
from genprune.bench import Sampling, draw_images
pipeline = StableDiffusionPipeline.from_pretrained({str(folders["dense"])!r})
sampling = Sampling(num_inference_steps=2, guidance_scale=3.0, batch_size=2)
draw_images(pipeline, {PROMPTS!r} * 300, sampling, {str(tmp_path)!r})
"""
    child = subprocess.Popen([sys.executable, "-c", program], env={**os.environ}, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while len(list(tmp_path.glob("?????.png"))) < 5 and time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    found = sorted(tmp_path.glob("?????.png"))
    assert len(found) >= 5
    for path in found[:7]:
        index = int(path.stem)
        assert torch.equal(load_image(tmp_path, index), load_image(drawn, index))
