"""Where the published EcoDiff release is wrong, and the test that holds the right behaviour here.

| # | right behaviour | test |
|---|---|---|
| 1 | an emptied attention or FFN gives its output bias | tests/families/test_cut.py |
| 2 | a FLUX single block loses its heads or its neurons alone | tests/families/test_cut.py |
| 3 | AdaLN without channels modulates with 0 | tests/families/test_cut.py |
| 4 | the kept count is exact, ties and one unit included | test_ecodiff.py, tests/allocation/test_allocation.py |
| 5 | a step is recomputed with its own input scaling | tests/denoising/test_trajectory.py, test_mask_objectives.py |
| 6 | mask noise is replayed | test_learned_gates.py, test_mask_objectives.py, tests/denoising/test_trajectory.py |
| 7 | a multistep solver's history carries gradient | tests/denoising/test_trajectory.py, test_mask_objectives.py |
| 8 | every kind enters the penalty | test_mask_penalties.py |
| 9 | the penalty raises no logit | test_mask_penalties.py |
| 10 | logits are float32; module order has no part in them | test_mask_logits.py, test_learned_gates.py, below |
| 11 | raw logits on disk | test_mask_logits.py |
| 12 | an optimiser step is the mean of a full group | test_mask_training.py |
| 13 | noise for each prompt and epoch, the target's the same | test_prompt_batches.py, test_mask_objectives.py |
| 14 | one step function with and without checkpointing | test_mask_objectives.py, tests/denoising/test_trajectory.py |
| 15 | one forward a call, one more in backward | below, tests/denoising/test_trajectory.py |
| 16 | masks belong to module names | test_learned_gates.py, below |
| 17 | what is looked at is what is exported | test_ecodiff.py |
| 18 | a budget of the whole model, penalties by cost | test_ecodiff.py, test_mask_penalties.py, test_mask_budget.py |
| 19 | only attributes that exist are changed | tests/families/test_cut.py, tests/families/test_failed_cuts.py |
| 20 | a smaller linear and an index for AdaLN | tests/families/test_cut.py, tests/saving/test_pruned_models.py |
| 21 | safetensors and JSON | tests/saving/test_pruned_models.py, tests/pipelines/test_round_trip.py, below |
| 22 | the default run is the documented one | below, test_ecodiff.py |
| 23 | every recipe runs | test_ecodiff.py |
| 24 | a clean install imports | tests/test_packaging.py, tests/test_imports.py |
| 25 | norms over all heads are refused | tests/families/test_refusals.py |
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from mask_cases import QUICK, DenoiserCalls, problem_of, trained

import genprune as gp
from genprune.masks import MaskLogits, MaskTraining
from genprune.masks.training import _Run

TESTS = Path(__file__).resolve().parent.parent


def test_the_table_names_files_that_exist():
    rows = re.findall(r"^\| (\d+) \|.*\| (.+) \|$", __doc__, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 26))
    for _, places in rows:
        for place in places.split(", "):
            path = TESTS.parent / place if "/" in place else TESTS / "masks" / place
            assert place == "below" or path.is_file(), place
            assert place == "below" or "def test_" in path.read_text(encoding="utf-8")


def test_pitfall_10_the_result_does_not_depend_on_the_order_of_sites(dit):
    problem = problem_of(dit)
    backwards = problem_of(dit)
    object.__setattr__(backwards, "masked", tuple(reversed(problem.masked)))
    one, other = (trained(each, train_steps=2).logits for each in (problem, backwards))
    assert all(torch.equal(one[name], other[name]) for name in problem.masked)


def test_pitfall_15_four_forwards_worth_of_calls_a_step(dit):
    """Dense target, student, and the student again in backward; each of two calls."""
    with DenoiserCalls(dit) as calls:
        trained(problem_of(dit), train_steps=1)
    assert calls.count == 2 + 2 + 2


def test_pitfall_16_logits_load_from_any_folder_and_say_what_they_are_of(dit, tmp_path):
    problem = problem_of(dit)
    trained(problem, train_steps=1, output_dir=tmp_path / "lr=9,keep=0.1")
    (tmp_path / "lr=9,keep=0.1" / "logits.safetensors").rename(tmp_path / "x")
    logits, settings = MaskLogits.load(tmp_path / "x")
    assert settings["learning_rate"] == MaskTraining().learning_rate and settings["keep"] == 0.8
    assert set(logits) == set(problem.masked)


def test_pitfall_21_nothing_is_pickled(dit, tmp_path):
    trained(problem_of(dit), train_steps=1, output_dir=tmp_path)
    files = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {".safetensors", ".json"}


def test_pitfall_22_the_default_run_has_the_documented_length(dit):
    """Nothing cuts prompts or steps short: all prompts but those for validation, all steps."""
    prompts = tuple(index % 3 for index in range(100))
    settings = MaskTraining()
    run = _Run(problem_of(dit, prompts=prompts), settings, 0)
    assert settings.train_steps == 200 and len(run.batches.prompts) == 100 - settings.validation_prompts
    seen = [run.batches.batch(step, 0) for step in range(24)]
    assert sum(len(batch.prompts) for batch in seen) == 96
    assert len(trained(problem_of(dit), train_steps=3).curve) == 3


@pytest.mark.parametrize("kinds", [("heads",), ("neurons",), ("modulation",)])
def test_pitfall_23_every_kind_is_optional(flux, kinds):
    """Removal of one kind needs no masks of another."""
    scores = gp.score(
        flux,
        gp.EcoDiff(**QUICK, train_steps=1, kinds=kinds, keep=0.97),
        prompts=["a cat"],
        pipeline_options={"height": 16, "width": 16, "max_sequence_length": 16},
        progress=False,
    )
    assert {scores.costs.sites[name].kind for name in scores.values} == set(kinds)
    assert scores.plan().removed()
