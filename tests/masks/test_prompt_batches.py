"""Which prompts, noises and guidance a step trains on: functions of its number."""

from __future__ import annotations

import dataclasses

import pytest

from genprune.errors import BadCalibrationData, GenpruneError
from genprune.masks import MaskTraining
from genprune.masks.batches import PromptBatches, TrajectoryBatch

PROMPTS = tuple(f"prompt {index}" for index in range(6))


def batches(prompts=PROMPTS, seed=0, rank=0, world=1, **settings) -> PromptBatches:
    return PromptBatches(prompts, MaskTraining(**({"batch_size": 2} | settings)), seed, rank, world)


def run(source: PromptBatches, steps: int) -> list[TrajectoryBatch]:
    """All trajectories of these optimiser steps, in order."""
    groups = source.settings.gradient_accumulation_steps
    return [source.batch(step, micro_batch) for step in range(steps) for micro_batch in range(groups)]


def noises(found: list[TrajectoryBatch]) -> dict[str, list[int]]:
    seen: dict[str, list[int]] = {}
    for batch in found:
        for prompt, seed in zip(batch.prompts, batch.seeds, strict=True):
            seen.setdefault(prompt, []).append(seed)
    return seen


@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_prompt_once_an_epoch_in_fixed_batches_and_another_order(accumulation):
    found = run(batches(gradient_accumulation_steps=accumulation), 12 // accumulation)
    epochs = [found[start : start + 3] for start in (0, 3, 6, 9)]
    for epoch in epochs:
        assert sorted(prompt for batch in epoch for prompt in batch.prompts) == sorted(PROMPTS)
        assert {batch.prompts for batch in epoch} == {batch.prompts for batch in epochs[0]}
    assert len({tuple(batch.prompts for batch in epoch) for epoch in epochs}) > 1
    assert all(batch.rows == 2 for batch in found)


def test_a_batch_that_the_prompts_do_not_fill_starts_again():
    found = run(batches(PROMPTS[:3]), 2)
    assert sorted(prompt for batch in found for prompt in batch.prompts) == sorted([*PROMPTS[:3], PROMPTS[0]])
    (alone,) = run(batches(PROMPTS[:1]), 1)
    assert alone.prompts == PROMPTS[:1] * 2 and len(set(alone.seeds)) == 2


def test_pitfall_13_every_prompt_and_epoch_has_noise_of_its_own():
    seen = noises(run(batches(noises_per_prompt=4), 3 * 9))
    everything = [seed for seeds in seen.values() for seed in seeds]
    assert len(set(everything)) == 6 * 4  # no two prompts share one, and each has four
    for seeds in seen.values():
        assert len(set(seeds[:4])) == 4 and seeds[4:8] == seeds[:4] and seeds[8] == seeds[0]
    fresh = noises(run(batches(noises_per_prompt=None), 3 * 9))
    assert all(len(set(seeds)) == 9 for seeds in fresh.values())


def test_dense_targets_are_kept_for_batches_that_come_again_and_no_others():
    found = run(batches(noises_per_prompt=2), 12)
    by_key = {}
    for batch in found:
        assert by_key.setdefault(batch.key, batch) == batch
    assert len(by_key) == 6
    assert all(batch.key is None for batch in run(batches(noises_per_prompt=None), 12))
    assert all(batch.key is None for batch in run(batches(guidance_scale=(1.0, 9.0)), 12))
    assert all(batch.key is not None for batch in run(batches(guidance_scale=5.0), 12))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:5], PROMPTS[:1], None])
def test_processes_share_the_rows_of_one_larger_batch(prompts, world):
    settings = {"gradient_accumulation_steps": 2, "noises_per_prompt": 2, "guidance_scale": (1.0, 7.0)}
    whole = run(batches(prompts, batch_size=2 * world, **settings), 7)
    parts = [run(batches(prompts, batch_size=2, rank=rank, world=world, **settings), 7) for rank in range(world)]
    for index, batch in enumerate(whole):
        for rank in range(world):
            part = parts[rank][index]
            assert part.seeds == batch.seeds[rank::world] and part.rows == batch.rows == 2 * world
            assert part.prompts == (None if prompts is None else batch.prompts[rank::world])
            assert part.guidance_scale == batch.guidance_scale and part.key == batch.key


def test_guidance_is_drawn_from_its_range():
    scales = [batch.guidance_scale for batch in run(batches(guidance_scale=(2.0, 6.0)), 40)]
    assert len(set(scales)) == 40 and 2 <= min(scales) < 3 and 5 < max(scales) <= 6
    assert {batch.guidance_scale for batch in run(batches(guidance_scale=3.0), 4)} == {3.0}
    assert {batch.guidance_scale for batch in run(batches(), 4)} == {None}


def test_a_batch_is_a_function_of_step_and_micro_batch():
    settings = {"gradient_accumulation_steps": 2, "noises_per_prompt": None, "guidance_scale": (1.0, 7.0)}
    forward, again = batches(**settings), batches(**settings)
    places = [(step, micro_batch) for step in range(9) for micro_batch in range(2)]
    known = {place: forward.batch(*place) for place in places}
    assert {place: again.batch(*place) for place in reversed(places)} == known
    assert run(batches(seed=1, **settings), 9) != list(known.values())


def test_unconditional_pipelines_have_noise_alone():
    found = run(batches(None), 8)
    assert all(batch.prompts is None and len(batch.seeds) == 2 for batch in found)
    assert len({seed for batch in found for seed in batch.seeds}) == 2 * 4  # four noises


def test_no_prompts_and_wrong_ranks_are_refused():
    with pytest.raises(BadCalibrationData, match="no prompts to learn masks on; pass e.g. prompts="):
        batches(())
    with pytest.raises(GenpruneError, match="process 2 of 2; expected a rank below the number of processes"):
        batches(rank=2, world=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        batches().seed = 3
