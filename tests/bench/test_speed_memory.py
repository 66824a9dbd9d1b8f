"""Speed of real pipelines in turns, and memory in a process of its own."""

from __future__ import annotations

import pytest
from tiny_pipeline import tiny_pipeline

from genprune.bench import BadCandidate, Candidate, Sampling, candidate_memory, compare_speed

SAMPLING = Sampling(num_inference_steps=2, batch_size=1)


def test_a_wider_denoiser_is_slower_and_nothing_stays_attached(tmp_path, pipeline):
    wide = tiny_pipeline(tmp_path, channels=(64, 128))
    before = dict(wide._progress_bar_config)
    timings = compare_speed({"dense": wide, "small": pipeline}, "dense", "a cat", SAMPLING, rounds=5)
    assert set(timings) == {"denoiser", "pipeline"}
    assert timings["denoiser"].ratio["small"].estimate < 0.9
    # a pipeline call holds two denoiser calls and more
    assert timings["pipeline"].median_ms["dense"] > timings["denoiser"].median_ms["dense"]
    for module in (wide.unet, pipeline.unet):
        assert not module._forward_pre_hooks and not module._forward_pre_hooks_with_kwargs
    assert wide._progress_bar_config == before


def test_memory_of_a_fresh_process(folders):
    peak = candidate_memory(Candidate("dense", model=str(folders["dense"])), "a cat", SAMPLING)
    assert peak.method == "rss-peak-fresh-process"
    assert 100 * 2**20 < peak.before_bytes < peak.peak_bytes < 4 * 2**30


def test_memory_errors(pipeline, tmp_path):
    with pytest.raises(BadCandidate, match="is a pipeline in memory.*save_pretrained"):
        candidate_memory(Candidate("a", pipeline=pipeline), "x", SAMPLING)
