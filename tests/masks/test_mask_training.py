"""Training: it resumes to the bit, stops with its checkpoint intact, averages groups, and keeps the best look."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from mask_cases import (
    QUICK,
    DenoiserCalls,
    learned_gates,
    problem_of,
    relative_error,
    same_state,
    small_dit_pipeline,
    state_of,
    trained,
)
from safetensors.torch import load_file, save_file

from genprune.errors import BadCalibrationData, GenpruneError, PlanMismatch
from genprune.masks import MaskLogits, MaskTraining
from genprune.masks.checkpoints import Progress, checkpoints
from genprune.masks.objectives import trajectory_loss
from genprune.masks.training import _Run
from genprune.masks.validation import PlanLook

LONG = {"train_steps": 6, "validate_every": 2, "validation_prompts": 1, "noises_per_prompt": 2}


def same_logits(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def problem(dit):
    return problem_of(dit, prompts=(0, 1, 2, 0))


@pytest.fixture(scope="module")
def finished(problem, tmp_path_factory):
    """A run that nothing interrupted, and its folder."""
    folder = tmp_path_factory.mktemp("finished")
    return trained(problem, output_dir=folder, checkpointing_steps=2, **LONG), folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of that folder without the last checkpoint: a run that was interrupted after step 4."""
    shutil.copytree(finished[1], tmp_path / "run")
    newest = checkpoints(tmp_path / "run")[-1]
    assert newest.name == "checkpoint-000006"
    shutil.rmtree(newest)
    return tmp_path / "run"


def test_it_learns_where_gradients_are_off_outside(problem):
    with torch.inference_mode():
        quiet = trained(problem, train_steps=2)
    assert same_logits(quiet.logits, trained(problem, train_steps=2).logits)


def test_what_a_run_leaves(finished, problem):
    outcome, folder = finished
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-000004", "checkpoint-000006"]
    assert [record["step"] for record in outcome.curve] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in outcome.curve if "validation_loss" in record] == [2, 4, 6]
    assert json.loads((folder / "curve.json").read_text()) == outcome.curve
    for record in outcome.curve:
        assert 0 < record["loss"] and 0.8 <= record["target_share"] <= 1 and record["price"] > 0
    logits, settings = MaskLogits.load(folder / "logits.safetensors")
    assert same_logits(logits.detached(), outcome.logits) and list(logits) == sorted(problem.masked)
    assert settings["keep"] == 0.8 and settings["prompts"] == [0, 1, 2, 0] and settings["train_steps"] == 6
    assert not list(folder.glob(".*"))  # no temporary names


def test_pitfall_12_one_optimiser_step_a_group(finished, problem):
    tensors = load_file(checkpoints(finished[1])[-1] / "training.safetensors")
    assert {float(tensors[f"step/{name}"]) for name in problem.masked} == {6.0}


@pytest.mark.parametrize("stop_at", [30, 38])
def test_an_interrupted_run_goes_on_to_the_bit(finished, problem, tmp_path, stop_at):
    expected, _ = finished
    before = state_of(problem.pipe)
    with pytest.raises(KeyboardInterrupt), DenoiserCalls(problem.pipe, stop_at):
        trained(problem, output_dir=tmp_path, checkpointing_steps=2, **LONG)
    assert same_state(state_of(problem.pipe), before)  # no gate is left
    left = checkpoints(tmp_path)
    assert left and left[-1].name < "checkpoint-000006" and not (tmp_path / "logits.safetensors").exists()
    outcome = trained(problem, output_dir=tmp_path, checkpointing_steps=2, resume=True, **LONG)
    assert same_logits(outcome.logits, expected.logits)
    assert outcome.curve == expected.curve and outcome.figures == expected.figures


def test_resuming_a_finished_run_changes_nothing(finished, problem):
    expected, folder = finished
    with DenoiserCalls(problem.pipe) as calls:
        outcome = trained(problem, output_dir=folder, resume=True, **LONG)
    assert calls.count == 0
    assert same_logits(outcome.logits, expected.logits) and outcome.figures == expected.figures


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"learning_rate": 0.3}, "learning_rate=0.1, this run has 0.3"),
        ({"seed": 5}, "seed=0, this run has 5"),
        ({"train_steps": 60}, "train_steps=6, this run has 60"),
        ({"learning_rates": (("heads", 0.2),)}, r"learning_rates=\[\], this run has \[\['heads', 0.2\]\]"),
    ],
)
def test_resuming_with_other_settings_is_refused_by_name(problem, folder, change, found):
    with pytest.raises(PlanMismatch, match=f"was made with {found}. Resume with the same settings, or start anew"):
        trained(problem, output_dir=folder, resume=True, **(LONG | change))


def test_resuming_for_another_budget_or_prompts_is_refused(dit, folder):
    for changed, found in (
        (problem_of(dit, keep=0.7, prompts=(0, 1, 2, 0)), "keep=0.8, this run has 0.7"),
        (problem_of(dit, prompts=(0, 1, 2, 1)), r"prompts=\[0, 1, 2, 0\], this run has \[0, 1, 2, 1\]"),
        (problem_of(dit, prompts=(0, 1, 2, 0), options={"guidance_scale": 1.5}), "this run has .*'1.5'"),
    ):
        with pytest.raises(PlanMismatch, match=found):
            trained(changed, output_dir=folder, resume=True, **LONG)
    other_sites = problem_of(dit, prompts=(0, 1, 2, 0), kinds=("neurons",), keep=0.8)
    with pytest.raises(PlanMismatch, match="these logits are of other sites than the model's: 2 differ"):
        trained(other_sites, output_dir=folder, resume=True, **LONG)


def test_a_damaged_or_newer_checkpoint_is_refused(problem, folder):
    path = checkpoints(folder)[-1]
    state, tensors = (path / "state.json").read_text(), load_file(path / "training.safetensors")

    def refused(match):
        with pytest.raises(PlanMismatch, match=match):
            trained(problem, output_dir=folder, resume=True, **LONG)

    (path / "state.json").write_text(json.dumps(json.loads(state) | {"format_version": 3}))
    refused("has format 3, this genprune reads up to 1. Upgrade with")
    for broken in (state[:-20], "[]", "{}", json.dumps({**json.loads(state), "controller": {}})):
        (path / "state.json").write_text(broken)
        refused(r"is no checkpoint of a mask training .*expected a folder with state.json and training.safetensors")
    (path / "state.json").write_text(state)
    save_file({name: value for name, value in tensors.items() if "heads" not in name}, path / "training.safetensors")
    refused("these logits are of other sites than the model's")
    (path / "training.safetensors").write_bytes(b"nothing")
    refused("is no checkpoint of a mask training")


def test_a_new_run_never_mixes_with_an_old_one(problem, folder):
    before = sorted(path.name for path in folder.iterdir())
    with (
        DenoiserCalls(problem.pipe) as calls,
        pytest.raises(
            GenpruneError,
            match=r"has checkpoints of an earlier training \(checkpoint-000004\); expected none. Pass resume",
        ),
    ):
        trained(problem, output_dir=folder, **LONG)
    assert calls.count == 0 and sorted(path.name for path in folder.iterdir()) == before


def test_not_a_number_is_an_error_and_leaves_the_checkpoint(folder):
    pipe = small_dit_pipeline()
    with torch.no_grad():
        pipe.transformer.proj_out_2.weight[0, 0] = float("nan")
    problem = problem_of(pipe, prompts=(0, 1, 2, 0))
    path = checkpoints(folder)[-1]
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(
        GenpruneError, match="the latents are NaN or infinite after step 1 of 2 .*expected finite ones"
    ):
        trained(problem, output_dir=folder, resume=True, **LONG)
    assert checkpoints(folder)[-1] == path
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.transformer.modules())


def test_a_loss_or_logit_that_is_not_finite_is_an_error(problem):
    run = _Run(problem, MaskTraining(**QUICK), 0)
    with run.gates, torch.no_grad():
        run.logits["transformer_blocks.0.ff:neurons"][3] = float("inf")
        run.logits["transformer_blocks.0.ff:neurons"][3] -= float("inf")
        with pytest.raises(GenpruneError, match="NaN or infinite|the loss of step 1 is nan; expected a finite one"):
            with torch.enable_grad():
                run.step(0)


def test_pitfall_12_a_group_is_the_mean_of_its_trajectories(problem):
    settings = MaskTraining(**QUICK, gradient_accumulation_steps=2, noises_per_prompt=3)
    run = _Run(problem, settings, 0)
    with run.gates:
        loss, found = run._loss_gradients(step=1)
        singles = []
        for micro_batch in range(2):
            run.gates.draw = 2 + micro_batch
            batch = run.batches.batch(1, micro_batch)
            part = trajectory_loss(problem.pipe, run.gates, run.dense, batch, settings)
            singles.append(
                (float(part.detach()), torch.autograd.grad(part, run.logits.parameters(), allow_unused=True))
            )
    assert loss == pytest.approx(sum(value for value, _ in singles) / 2, rel=1e-6)
    expected = [sum(0 if g is None else g for g in both) / 2 for both in zip(*(gradients for _, gradients in singles))]
    expected = [torch.zeros_like(f) if isinstance(e, float) else e for f, e in zip(found, expected)]
    assert relative_error(found, expected) < 1e-6 and any(bool(gradient.any()) for gradient in found)
    assert singles[0][0] != singles[1][0]


def test_learning_rates_by_kind(problem):
    """AdamW's first step moves a logit by its learning rate."""
    outcome = trained(problem, train_steps=1, learning_rate=0.3, learning_rates=(("neurons", 0.02),), init=1.0)
    for name, values in outcome.logits.items():
        rate = 0.02 if name.endswith("neurons") else 0.3
        moved = (values - 1).abs()
        # the price starts where it balances one unit, which then stays
        assert int(((moved / rate - 1).abs() < 1e-3).sum()) >= len(values) - 1


def test_validation_keeps_the_best_look(finished, problem):
    outcome, _ = finished
    looks = {record["step"]: record["validation_loss"] for record in outcome.curve if "validation_loss" in record}
    assert outcome.figures["validation_loss"] == min(looks.values())
    assert looks[outcome.figures["best_step"]] == min(looks.values())
    run = _Run(problem, MaskTraining(**(QUICK | LONG)), 0)
    with run.gates:
        assert run.looker.loss(outcome.logits, run.gates) == min(looks.values())  # those logits are the best look's
        state = Progress(step=1, curve=[{}])
        good = {name: torch.arange(len(v)).float() for name, v in run.logits.items()}
        run.logits.copy_(good)
        run.look(state)
        first = state.best_loss
        for step, values in ((2, {name: v.flip(0) for name, v in good.items()}), (3, good)):
            state.step, state.curve = step, [*state.curve, {}]
            run.logits.copy_(values)
            run.look(state)
        worst_first = state.curve[1]["validation_loss"]
    assert first != worst_first and state.best_loss == min(first, worst_first)
    assert state.best_step == (1 if first < worst_first else 2)
    expected = good if first < worst_first else {name: v.flip(0) for name, v in good.items()}
    assert same_logits(state.best, expected)


def test_validation_looks_with_the_trainings_guidance(sd):
    problem = problem_of(sd, prompts=("a cat", "b", "c", "d"), kinds=("neurons",), keep=0.97)
    for given, expected in ((None, None), (3.0, 3.0), ((2.0, 6.0), 4.0)):
        settings = MaskTraining(guidance_scale=given)
        look = PlanLook(problem, None, settings, count=2, seed=0)
        assert look.batch.guidance_scale == expected and look.batch.prompts == ("c", "d")


def test_validation_prompts_are_not_trained_on(problem):
    seen = _Run(problem, MaskTraining(**(QUICK | LONG)), 0)
    assert seen.batches.prompts == (0, 1, 2) and seen.looker.batch.prompts == (0,)
    few = _Run(problem, MaskTraining(**(QUICK | LONG | {"validation_prompts": 2})), 0)
    assert few.batches.prompts == (0, 1, 2, 0) and few.looker.batch.prompts == (2, 0)  # too few to spare any
    assert _Run(problem, MaskTraining(**QUICK), 0).looker is None


def test_it_stops_early_and_stays_stopped(problem, tmp_path):
    """Logits that hardly move never look better twice in a row."""
    settings = LONG | {"train_steps": 40, "validate_every": 1, "patience": 2, "learning_rate": 1e-6, "anneal": 0.05}
    outcome = trained(problem, output_dir=tmp_path, **settings)
    assert len(outcome.curve) < 40 and outcome.figures["steps"] == len(outcome.curve)
    looks = [record["validation_loss"] for record in outcome.curve]
    assert all(loss >= outcome.figures["validation_loss"] for loss in looks[-2:])
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{len(looks):06d}"]
    with DenoiserCalls(problem.pipe) as calls:
        again = trained(problem, output_dir=tmp_path, resume=True, **settings)
    assert calls.count == 0 and same_logits(again.logits, outcome.logits)


def test_a_look_that_no_plan_serves_does_not_end_the_run(dit):
    from genprune.errors import BudgetUnreachable

    problem = problem_of(dit, prompts=(0, 1, 2, 0))

    def never(logits):
        raise BudgetUnreachable("lies between two legal plans")

    object.__setattr__(problem, "select", never)
    outcome = trained(problem, **(LONG | {"train_steps": 2}))
    assert outcome.figures.keys() == {"steps", "expected_share"} and len(outcome.curve) == 2


def test_seeds_and_prompts_matter(problem, finished):
    one, same_seed, other = (trained(problem, seed, train_steps=2) for seed in (0, 0, 1))
    assert same_logits(one.logits, same_seed.logits) and not same_logits(one.logits, other.logits)


def test_the_copy_of_a_pipeline_trains_alike(problem):
    copied = problem_of(copy.deepcopy(problem.pipe), prompts=(0, 1, 2, 0))
    assert same_logits(trained(problem, train_steps=1).logits, trained(copied, train_steps=1).logits)


def test_no_prompts(dit):
    with pytest.raises(BadCalibrationData, match="no prompts to learn masks on"):
        trained(problem_of(dit, prompts=()), train_steps=1)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"train_steps": 0}, "train_steps=0; expected a whole number of at least 1"),
        ({"batch_size": True}, "batch_size=True; expected a whole number"),
        ({"patience": 0}, "patience=0; expected a whole number of at least 1"),
        ({"validate_every": -1}, "validate_every=-1; expected a whole number of at least 0"),
        ({"learning_rate": 0}, "the learning rate learning_rate is 0; expected a number above 0"),
        ({"learning_rates": (("heads", -1.0),)}, "the learning rate heads is -1.0; expected a number above 0"),
        ({"learning_rates": (("haeds", 0.1),)}, "learning_rates names 'haeds', nearest name: 'heads'"),
        ({"anneal": 0}, r"anneal=0; expected a share of the steps in \(0, 1\]"),
        ({"anneal": "all"}, "anneal='all'; expected a finite number"),
        ({"init": float("nan")}, "init=nan; expected a finite number"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1; expected a number of at least 0"),
        ({"loss": "l3"}, "loss='l3'.*expected one of rel_l2, rel_norm, mse, l1"),
        ({"objective": "steps"}, "objective='steps'.*expected one of trajectory, chain, per_step"),
        ({"guidance_scale": (5.0, 2.0)}, r"guidance_scale=\(5.0, 2.0\); expected .*\(low, high\) with 0 <= low"),
        ({"guidance_scale": (5.0,)}, "expected a number of at least 0, or"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0; expected a number of at least 0"),
        ({"penalty": "l0"}, "penalty='l0'.*expected one of smooth_l0"),
        ({"damping": 0}, "expected temperature > 0, damping > 0"),
    ],
)
def test_settings_are_checked(settings, match):
    with pytest.raises(GenpruneError, match=match):
        MaskTraining(**settings).check()


def test_learned_gates_of_another_model_do_not_fit(dit, flux):
    with pytest.raises((AttributeError, GenpruneError)):
        gates = learned_gates(flux)
        gates.model = dit.transformer
        with gates:
            pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in dit.transformer.modules())
