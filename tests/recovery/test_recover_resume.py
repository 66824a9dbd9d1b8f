"""Interrupt and resume to the bit; failures that put the last good weights back."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from recovery_cases import (
    PROMPTS,
    denoiser_batches,
    labelled_images,
    quick,
    recovered,
    same_weights,
    small_vit,
    student_of,
    weights_of,
)
from safetensors.torch import load_file
from tiny_hosts import flux
from tiny_pipelines import sd_pipeline

from genprune.errors import GenpruneError, PlanMismatch
from genprune.families import denoiser
from genprune.recovery import RecoveryFailed

CASES = {
    "ema": {"ema_decay": 0.9, "gradient_accumulation": 2, "lr_scheduler": "cosine", "warmup_steps": 2},
    "learned weights": {"learned_weights": True, "normalizer": "first_ref", "prompt_dropout": 0.3},
    "lora": {"lora_rank": 2, "normalizer": "masked", "min_snr_gamma": 5.0},
}


def stopping(at):
    """A validation callback that is interrupted after some step."""

    def look(step, target):
        if step == at:
            raise KeyboardInterrupt
        return {}

    return look


@pytest.mark.parametrize("name", CASES)
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(name, tmp_path):
    teacher = sd_pipeline(tmp_path)
    students = [student_of(teacher, "mid_block.attentions.0:wrapper") for _ in range(3)]
    settings = quick(steps=7, **CASES[name])
    run = {"prompts": PROMPTS, "checkpointing_steps": 3}
    whole = recovered(students[0], teacher, settings, output_dir=tmp_path / "whole", **run)

    look = {"validation": stopping(5), "validation_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        recovered(students[1], teacher, settings, output_dir=tmp_path / "broken", **run, **look)
    assert (tmp_path / "broken" / "checkpoint-000005").is_dir()  # the step that was done, not the last regular one
    assert not any(module._forward_hooks for module in teacher.unet.modules())

    torch.manual_seed(123)  # a resumed process has another random state, and its model other weights
    with torch.no_grad():
        for parameter in (*students[2].unet.parameters(),) if name != "lora" else ():
            parameter.add_(1)
    done = recovered(students[2], teacher, settings, output_dir=tmp_path / "broken", resume=True, **run)
    assert same_weights(weights_of(students[0]), weights_of(students[2]))
    assert not same_weights(weights_of(students[0]), weights_of(students[1]))
    for file in (tmp_path / "whole" / "checkpoint-000007").glob("*.safetensors"):
        found = load_file(tmp_path / "broken" / "checkpoint-000007" / file.name)
        assert same_weights(load_file(file), found), file.name
    plain = [{key: value for key, value in record.items() if key != "validation"} for record in done.curve]
    assert plain == whole.curve and done.steps == 7
    assert not list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.pt")) + list(tmp_path.rglob("*.pkl"))


def test_resuming_a_finished_run_gives_its_weights(tmp_path):
    teacher = flux().eval()
    data, one, other = denoiser_batches(teacher), *(student_of(teacher, "transformer_blocks.0:block") for _ in "ab")
    settings = quick(ema_decay=0.5)
    first = recovered(one, teacher, settings, data=data, output_dir=tmp_path)
    again = recovered(other, teacher, settings, data=data, output_dir=tmp_path, resume=True)
    assert same_weights(weights_of(one), weights_of(other)) and again.curve == first.curve


def test_a_ctrl_c_inside_a_step_leaves_the_step_before(tmp_path):
    teacher = flux().eval()
    data, settings = denoiser_batches(teacher), quick(steps=6)
    whole, broken = (student_of(teacher, "transformer_blocks.0:block") for _ in "ab")
    recovered(whole, teacher, settings, data=data)

    calls = []

    def stop(module, inputs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = broken.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        recovered(broken, teacher, settings, data=data, output_dir=tmp_path)
    handle.remove()
    assert (tmp_path / "checkpoint-000003").is_dir()
    recovered(broken, teacher, settings, data=data, output_dir=tmp_path, resume=True)
    assert same_weights(weights_of(whole), weights_of(broken))


def test_another_run_is_not_resumed(tmp_path):
    teacher = flux().eval()
    data = denoiser_batches(teacher)
    student = student_of(teacher, "transformer_blocks.0:block")
    fresh = copy.deepcopy(student)
    recovered(student, teacher, data=data, output_dir=tmp_path)
    with pytest.raises(GenpruneError, match="has checkpoints of an earlier recovery .checkpoint-000004.*resume=True"):
        recovered(copy.deepcopy(fresh), teacher, data=data, output_dir=tmp_path)
    run = {"data": data, "output_dir": tmp_path, "resume": True}
    with pytest.raises(PlanMismatch, match="made with learning_rate=0.001, this run has 0.002"):
        recovered(copy.deepcopy(fresh), teacher, quick(learning_rate=2e-3), **run)
    with pytest.raises(PlanMismatch, match="made with data="):
        recovered(copy.deepcopy(fresh), teacher, **(run | {"data": data[:2]}))
    with pytest.raises(PlanMismatch, match="made with (feature_pairs|model)="):
        recovered(student_of(teacher, "transformer_blocks.1:block"), teacher, **run)
    (tmp_path / "checkpoint-000004" / "optimizer.safetensors").write_text("no")
    before = weights_of(fresh)
    with pytest.raises(PlanMismatch, match="checkpoint-000004' is no checkpoint of a recovery.*Delete it to resume"):
        recovered(fresh, teacher, **run)
    assert same_weights(weights_of(fresh), before)
    with pytest.raises(GenpruneError, match="resume=True without output_dir"):
        recovered(fresh, teacher, data=data, resume=True)


class Poison:
    """From some forward of a module on, multiplies its output: the weights stay as they are."""

    def __init__(self, module, after, factor):
        self.calls, self.after, self.factor = 0, after, factor
        self.handle = module.register_forward_hook(self.hook)

    def hook(self, module, inputs, output):
        self.calls += 1
        return output * self.factor if self.calls > self.after else output


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_term_that_is_not_finite_stops_and_puts_the_last_good_weights_back(on_disk, tmp_path):
    teacher, data, seen = flux().eval(), None, {}
    data = denoiser_batches(teacher)
    student = student_of(teacher, "transformer_blocks.0:block")
    before = weights_of(teacher)
    poison = Poison(student.proj_out, after=5, factor=float("nan"))
    run = {"output_dir": tmp_path} if on_disk else {}
    look = {"validation": lambda step, target: seen.__setitem__(step, weights_of(target)), "validation_steps": 1}
    with pytest.raises(RecoveryFailed, match="'task' of step 6 is nan; expected.*after step 4 again.*learning_rate"):
        recovered(student, teacher, quick(steps=10), data=data, checkpointing_steps=4, **run, **look)
    poison.handle.remove()
    assert same_weights(weights_of(student), seen[4])
    assert same_weights(weights_of(teacher), before)
    assert not any(module._forward_hooks for module in (*student.modules(), *teacher.modules()))
    if on_disk:
        assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == [
            "checkpoint-000000",
            "checkpoint-000004",
        ]
        done = recovered(student, teacher, quick(steps=10), data=data, output_dir=tmp_path, resume=True)
        assert done.steps == 10 and [record["step"] for record in done.curve] == list(range(1, 11))


def test_a_checkpoint_whose_own_loss_was_bad_is_not_the_good_one(tmp_path):
    """Weights after step 4 give nan in step 5: the checkpoint of step 4 goes, that of step 2 stays."""
    teacher = flux().eval()
    data, student = denoiser_batches(teacher), student_of(teacher, "transformer_blocks.0:block")
    poison = Poison(student.proj_out, after=4, factor=float("inf"))
    with pytest.raises(RecoveryFailed, match="of step 5 is .*after step 2 again"):
        recovered(student, teacher, quick(steps=10), data=data, output_dir=tmp_path, checkpointing_steps=2)
    poison.handle.remove()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-000002"]


def test_a_diverging_run_stops_before_its_bad_checkpoints(tmp_path):
    teacher = flux().eval()
    data, student = denoiser_batches(teacher), student_of(teacher, "transformer_blocks.0:block")
    poison = Poison(student.proj_out, after=14, factor=100.0)
    settings = quick(steps=40, divergence_factor=10, divergence_patience=3, learning_rate=1e-5)
    with pytest.raises(
        RecoveryFailed, match="loss of step 17 is .*3 steps above 10 times.*largest term is '(task|out)"
    ):
        recovered(student, teacher, settings, data=data, output_dir=tmp_path, checkpointing_steps=5)
    poison.handle.remove()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-000005", "checkpoint-000010"]
    records = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert len(records) == 16 and records[-1]["loss"] > 10 * records[0]["loss"]


def test_a_gradient_that_is_not_finite_is_named():
    teacher, data = small_vit(), labelled_images()
    student = student_of(teacher, "blocks.1:block")
    student.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weights_of(student)
    with pytest.raises(RecoveryFailed, match="the gradient of 'norm.weight' in step 1 is not finite"):
        recovered(student, teacher, data=data)
    assert same_weights(weights_of(student), before)
    assert all(parameter.grad is None for parameter in denoiser(student).parameters())
