"""`finetune_experts`: each expert on its own prompts, from the dense weights; steps split; resumed; refused."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from router_cases import WORDS, expert_plans, small_router
from safetensors.torch import load_file
from tiny_pipelines import sd3_pipeline, sd_pipeline

import genprune as gp
from genprune.recovery import pipeline_data as data_module
from genprune.recovery.pipeline_data import pipeline_data
from genprune.routers.finetuning import finetune_experts, split_steps
from genprune.routers.timestep_router import TimestepRouter

SIZE = {"height": 16, "width": 16}


@pytest.fixture(autouse=True)
def no_accelerator_of_another_test():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    made = sd_pipeline(tmp_path_factory.mktemp("sd"))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def router(pipe):
    return small_router(pipe, 2)


def method(**changes) -> gp.NormalizedDistillation:
    quick = {"steps": 3, "batch_size": 2, "learning_rate": 1e-3, "teacher_steps": 1}
    return gp.NormalizedDistillation(**(quick | changes))


def tuned(pipe, router, folder, settings=None, **run):
    given = {"prompts": WORDS[:4], "pipeline_options": SIZE, "progress": False} | run
    return finetune_experts(pipe, router, settings or method(), output_dir=folder, **given)


def state(pipe) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in pipe.unet.state_dict().items()}


def applied(pipe, expert) -> torch.nn.Module:
    """The cut model with the expert's tensors in it, as serving loads them."""
    model = gp.cut(copy.deepcopy(pipe.unet), expert.plan)
    tensors = load_file(expert.weights)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in tensors.items():
            parameters[name].copy_(value)
    return model


def test_steps_are_split_by_largest_remainder_and_every_expert_with_data_gets_one():
    assert split_steps(10, [6, 3, 1]) == [6, 3, 1]
    assert split_steps(10, [1, 1, 1]) == [4, 3, 3]
    assert split_steps(7, [5, 0, 3]) == [4, 0, 3]
    assert split_steps(3, [98, 1, 1]) == [1, 1, 1]
    assert split_steps(100, [998, 1, 1]) == [98, 1, 1]
    assert split_steps(7, [9, 0, 1], "equal") == [4, 0, 3]
    for total in (5, 17, 1000):
        assert sum(split_steps(total, [0.31, 0.2, 0.09, 0.4, 0.0])) == total
    with pytest.raises(gp.BadCalibrationData, match="1 steps for 2 experts with data; expected at least one"):
        split_steps(1, [3, 4])
    with pytest.raises(gp.BadCalibrationData, match="0 experts with data"):
        split_steps(3, [0.0, 0.0])


def test_each_expert_is_trained_on_its_own_prompts_and_the_dense_model_stays(pipe, router, tmp_path):
    before = state(pipe)
    result = tuned(pipe, router, tmp_path, assignment=[0, 0, 0, 1])
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    assert not any(parameter.grad is not None for parameter in pipe.unet.parameters())
    notes = [json.loads((tmp_path / f"expert-{k:02d}" / "finetuned.json").read_text()) for k in (0, 1)]
    assert [note["rows"] for note in notes] == [3, 1] and [note["steps"] for note in notes] == [2, 1]
    assert [expert.plan == old.plan for expert, old in zip(result.experts, router.experts)] == [True, True]
    assert router.experts[0].weights is None and result.experts[0].weights.parent.name == "expert-00"
    for expert in result.experts:
        cut = gp.cut(copy.deepcopy(pipe.unet), expert.plan)
        assert load_file(expert.weights).keys() <= dict(cut.named_parameters()).keys()
        assert not torch.equal(_output(applied(pipe, expert)), _output(cut))


def _output(model) -> torch.Tensor:
    torch.manual_seed(3)
    text = torch.randn(1, 4, model.config.cross_attention_dim)
    with torch.no_grad():
        return model.eval()(torch.randn(1, 4, 8, 8), torch.tensor([500]), text).sample


def test_the_weights_are_those_that_recover_would_have_left(pipe, router, tmp_path):
    expert = tuned(pipe, router, tmp_path / "experts", assignment=[1, 0, 1, 0], split="equal").experts[1]
    # steps 3 over two experts: 2 and 1
    student = copy.copy(pipe)
    student.__dict__["unet"] = gp.cut(copy.deepcopy(pipe.unet), expert.plan)
    settings = method(steps=1)
    # the rows that were drawn for all prompts, not drawn again for these two
    everything = pipeline_data(pipe, pipe, method(), WORDS[:4], None, SIZE)
    gp.recover(student, pipe, settings, data=everything.part([0, 2]), progress=False)
    found = applied(pipe, expert).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in student.unet.state_dict().items())


def test_prompts_go_where_the_router_sends_them(pipe, router, tmp_path):
    routed = router.route(WORDS).experts
    assert set(routed) == {0, 1}  # or the test shows nothing
    latents = torch.randn(len(WORDS), 4, 8, 8)
    tuned(pipe, router, tmp_path, prompts=WORDS, data=latents, pipeline_options=None)
    for number in (0, 1):
        note = json.loads((tmp_path / f"expert-{number:02d}" / "finetuned.json").read_text())
        part = pipeline_data(pipe, pipe, method(), WORDS, latents, {}).part(
            [row for row, expert in enumerate(routed) if expert == number]
        )
        assert note["described"]["data"] == part.fingerprint and note["rows"] == len(part.clean)


def test_latents_are_made_once_for_all_experts(pipe, router, tmp_path, monkeypatch):
    made = []
    original = data_module._made
    monkeypatch.setattr(data_module, "_made", lambda *given: made.append(1) or original(*given))
    tuned(pipe, router, tmp_path, assignment=[0, 1, 0, 1])
    assert made == [1] and (tmp_path / "teacher_data").is_dir()


def test_an_expert_without_prompts_keeps_its_cut_weights_and_this_is_said(pipe, router, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="genprune.routers.finetuning"):
        result = tuned(pipe, router, tmp_path, assignment=[1, 1, 1, 1])
    assert "no training prompt is routed to expert 0" in caplog.text
    assert result.experts[0] == router.experts[0] and not (tmp_path / "expert-00").exists()
    note = json.loads((tmp_path / "expert-01" / "finetuned.json").read_text())
    assert note["steps"] == 3  # all of them: equal total compute


def test_a_lora_for_each_expert_loads_on_its_cut_pipeline(pipe, router, tmp_path):
    result = tuned(pipe, router, tmp_path, method(lora_rank=2), assignment=[0, 1, 0, 1])
    expert = result.experts[0]
    assert expert.weights is None and expert.lora.name == "pytorch_lora_weights.safetensors"
    assert not (tmp_path / "expert-00" / "weights.safetensors").exists()
    student = copy.copy(pipe)
    student.__dict__["unet"] = gp.cut(copy.deepcopy(pipe.unet), expert.plan)
    plain = _output(student.unet)
    student.load_lora_weights(expert.lora.parent)
    assert not torch.equal(_output(student.unet), plain)
    assert not hasattr(pipe.unet, "peft_config")


@pytest.mark.parametrize("rank", [None, 2])
def test_a_resumed_run_ends_as_an_uninterrupted_one(pipe, router, tmp_path, rank):
    given = {"settings": method(steps=4, lora_rank=rank), "assignment": [0, 1, 0, 1], "checkpointing_steps": 1}
    file = "weights.safetensors" if rank is None else "pytorch_lora_weights.safetensors"
    tuned(pipe, router, tmp_path / "whole", **given)
    tuned(pipe, router, tmp_path / "cut", **given)
    with pytest.raises(gp.GenpruneError, match="has expert-01 of an earlier fine-tuning; expected none. Pass resume"):
        tuned(pipe, router, tmp_path / "cut", **given)
    second = tmp_path / "cut" / "expert-01"  # as if the run had ended within the second expert
    shutil.rmtree(second / "checkpoint-000002")
    for left in ("finetuned.json", file):
        (second / left).unlink()
    first = (tmp_path / "cut" / "expert-00" / file).stat().st_mtime_ns
    tuned(pipe, router, tmp_path / "cut", **given, resume=True)
    assert (tmp_path / "cut" / "expert-00" / file).stat().st_mtime_ns == first  # done is done
    for number in ("expert-00", "expert-01"):
        whole, again = (load_file(tmp_path / name / number / file) for name in ("whole", "cut"))
        assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def test_an_expert_of_another_run_is_not_taken(pipe, router, tmp_path):
    tuned(pipe, router, tmp_path, assignment=[0, 1, 0, 1])
    with pytest.raises(gp.PlanMismatch, match="expert-00' was trained with another method than this run"):
        tuned(pipe, router, tmp_path, method(learning_rate=2e-3), assignment=[0, 1, 0, 1], resume=True)
    other = small_router(pipe, 2, plans=expert_plans(pipe, 3)[1:])
    with pytest.raises(gp.PlanMismatch, match="another plan than"):
        tuned(pipe, other, tmp_path, assignment=[0, 1, 0, 1], resume=True)
    (tmp_path / "expert-00" / "weights.safetensors").unlink()
    with pytest.raises(gp.PlanMismatch, match="weights.safetensors' is missing"):
        tuned(pipe, router, tmp_path, assignment=[0, 1, 0, 1], resume=True)
    (tmp_path / "expert-00" / "finetuned.json").write_text("{")
    with pytest.raises(gp.PlanMismatch, match="cannot be read"):
        tuned(pipe, router, tmp_path, assignment=[0, 1, 0, 1], resume=True)


def test_experts_of_a_timestep_router_are_trained_at_their_own_timesteps(pipe, tmp_path):
    router = TimestepRouter(small_router(pipe, 2).experts, boundaries=(0.3,), base=small_router(pipe, 2).base)
    everything = pipeline_data(pipe, pipe, method(), WORDS[:4], None, SIZE)
    train = everything.process.train_timesteps
    for number, bounds in enumerate(((0.0, 0.3), (0.3, 1.0))):
        drawn = everything.part(range(4), bounds).rows(range(40)).inputs["timestep"]
        assert {router.expert_at(float(timestep) / train) for timestep in drawn} == {number}
    tuned(pipe, router, tmp_path, method(steps=10))
    notes = [json.loads((tmp_path / f"expert-{k:02d}" / "finetuned.json").read_text()) for k in (0, 1)]
    assert [note["steps"] for note in notes] == [3, 7] and [note["rows"] for note in notes] == [4, 4]
    with pytest.raises(gp.BadCalibrationData, match="given with a timestep router"):
        tuned(pipe, router, tmp_path / "other", assignment=[0, 1, 0, 1])
    with pytest.raises(gp.GenpruneError, match="none of the 1000 training timesteps"):
        everything.part([0], (0.5001, 0.5002))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"assignment": [0, 1]}, "2 experts are assigned to 4 prompts"),
        ({"assignment": [0, 1, 2, 0]}, r"assignment\[2\] is 2; expected the number of an expert, 0 to 1"),
        ({"split": "even"}, "split='even'; expected one of usage, equal"),
        ({"settings": method(steps=1), "assignment": [0, 1, 0, 1]}, "1 steps for 2 experts"),
        ({"settings": "lora"}, "method is 'lora'; expected a way to recover"),
        ({"data": torch.randn(3, 4, 8, 8)}, "4 prompts for 3 latents"),
        ({"prompts": ["a cat", " "]}, r"prompts\[1\] is ' '"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(pipe, router, tmp_path, change, words):
    with pytest.raises(gp.GenpruneError, match=words):
        tuned(pipe, router, tmp_path / "out", **change)
    assert not list(tmp_path.rglob("expert-*"))


def test_another_base_and_fine_tuned_experts_are_refused(pipe, router, tmp_path):
    other = sd3_pipeline(tmp_path)
    with pytest.raises(gp.PlanMismatch):
        tuned(other, router, tmp_path / "out")
    with pytest.raises(gp.GenpruneError, match="expected the dense pipeline"):
        tuned(pipe.unet, router, tmp_path / "out")
    result = tuned(pipe, router, tmp_path / "out", assignment=[0, 1, 0, 1])
    with pytest.raises(gp.PlanMismatch, match="expert 0 is fine-tuned already"):
        tuned(pipe, result, Path(tmp_path) / "again")
