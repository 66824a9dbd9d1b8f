"""`recover`: what it improves, what it leaves alone, what it writes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from families.family_cases import randomise_
from recovery_cases import (
    PROMPTS,
    SIZE,
    denoiser_batches,
    labelled_images,
    quick,
    recovered,
    same_weights,
    small_vit,
    state_of,
    student_of,
    weights_of,
)
from tiny_hosts import flux, sd_unet, vit
from tiny_pipelines import (
    ddpm_pipeline,
    flux_pipeline,
    pixart_sigma_pipeline,
    sd3_pipeline,
    sd_pipeline,
)

import genprune as gp
from genprune.errors import BadCalibrationData, GenpruneError, NoMatchingSites, PlanMismatch
from genprune.families import denoiser

# the teacher's weights are random: nothing to learn from the task
LONGER = {"steps": 40, "batch_size": 4, "task_weight": 0, "learning_rate": 1e-3, "lr_scheduler": "cosine"}
TEXT = {"max_sequence_length": 16} | SIZE
PIPELINES = {
    "sd": (sd_pipeline, "up_blocks.1.attentions.0:wrapper", PROMPTS, {}),
    "flux": (flux_pipeline, "transformer_blocks.0:block", PROMPTS, TEXT),
    "sd3": (sd3_pipeline, "transformer_blocks.1:block", PROMPTS, TEXT),
    "pixart": (pixart_sigma_pipeline, "transformer_blocks.1:block", PROMPTS, TEXT | {"use_resolution_binning": False}),
    "ddpm": (lambda folder: ddpm_pipeline(), "down_blocks.0.resnets.0:branch", None, {}),
}


def pipeline_case(name, folder):
    build, removed, prompts, options = PIPELINES[name]
    teacher = build(folder)
    randomise_(denoiser(teacher))  # a fresh model's blocks hardly change anything
    return teacher, student_of(teacher, removed), {"prompts": prompts, "pipeline_options": options}


def output_error(student, teacher, batches) -> float:
    with torch.no_grad():
        pairs = [[model(**inputs).sample for model in (student, teacher)] for inputs, _ in batches]
    return float(sum((one - other).square().mean() for one, other in pairs))


# ---- it improves ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [sd_unet, flux], ids=["unet", "flux"])
def test_a_taylor_cut_denoiser_answers_more_like_its_teacher(build):
    teacher = randomise_(build())
    student, data = copy.deepcopy(teacher), denoiser_batches(teacher, count=8)
    gp.cut(student, gp.make_plan(student, gp.Taylor(keep=0.6), data=data[:2], progress=False))
    unseen = denoiser_batches(teacher, count=10)[8:]
    before = output_error(student, teacher, unseen)
    recovered(student, teacher, quick(**LONGER), data=data)
    assert output_error(student, teacher, unseen) < 0.7 * before


def test_a_taylor_cut_classifier_agrees_with_its_teacher_again():
    teacher, data = randomise_(vit()), labelled_images(count=8)
    student = copy.deepcopy(teacher)
    gp.cut(student, gp.make_plan(student, gp.Taylor(keep=0.5), data=data[:2], progress=False))
    images = labelled_images(count=10)[-1][0]

    def error():
        with torch.no_grad():
            return float((student(images) - teacher(images)).square().mean())

    before = error()
    recovered(student, teacher, quick(**LONGER), data=data)
    assert error() < 0.7 * before


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_recovers_on_what_its_teacher_draws(name, tmp_path):
    teacher, student, run = pipeline_case(name, tmp_path)
    before, weights, start = state_of(teacher), weights_of(teacher), weights_of(student)
    modes = [module.training for module in denoiser(student).modules()]
    batches = denoiser_batches(denoiser(teacher))
    error = output_error(denoiser(student), denoiser(teacher), batches)
    settings = quick(steps=12, task_weight=0, learning_rate=2e-4, min_snr_gamma=5.0 if name == "sd" else None)
    done = recovered(student, teacher, settings, **run)
    assert output_error(denoiser(student), denoiser(teacher), batches) < error
    # the teacher is bit-equal, and no hook, flag or mode is left changed
    assert state_of(teacher) == before and same_weights(weights_of(teacher), weights)
    assert not same_weights(weights_of(student), start)
    assert modes == [module.training for module in denoiser(student).modules()]
    assert not any(module._forward_hooks for module in denoiser(student).modules())
    assert all(parameter.grad is None for parameter in denoiser(student).parameters())
    assert done.steps == len(done.curve) == 12 and done.figures["samples_per_second"] > 0


# ---- data -----------------------------------------------------------------------------------------------------------


def test_rows_are_what_the_stock_pipeline_calls_its_denoiser_with(tmp_path):
    """The clean latents noised by hand, and the pipeline's own conditions; dropped prompts see the negative ones."""
    from genprune.denoising import capture_runs
    from genprune.recovery.pipeline_data import pipeline_data

    teacher = sd_pipeline(tmp_path)
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    prompts = ["abc", "cde", "abc", "foo"]
    data = pipeline_data(teacher, teacher, quick(prompt_dropout=0.5), prompts, latents, {})
    assert torch.equal(data.clean, latents) and data.conditions.rows["encoder_hidden_states"].shape[0] == 3
    negative = data.conditions.negative["encoder_hidden_states"][0]
    kept, run = 0, {"steps": 1, "batch_size": 1, "guidance_scale": 5.0}
    calls = {each: next(capture_runs(teacher, [each], **run)).calls[0] for each in set(prompts)}
    for index in range(16):
        rows, item = data.rows([index]), data.order.item(index)
        timestep = int(rows.inputs["timestep"])
        alpha = teacher.scheduler.alphas_cumprod[timestep]
        signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
        noise = (rows.inputs["sample"][0] - signal * latents[item]) / sigma
        # the target of this pipeline is v
        torch.testing.assert_close(rows.target[0], signal * noise - sigma * latents[item], rtol=1e-3, atol=1e-3)
        given = rows.inputs["encoder_hidden_states"][0]
        unconditional, conditional = calls[prompts[item]].inputs["encoder_hidden_states"]
        torch.testing.assert_close(negative, unconditional)
        dropped = torch.equal(given, negative)
        torch.testing.assert_close(given, unconditional if dropped else conditional, rtol=1e-5, atol=1e-5)
        kept += not dropped
    assert 3 < kept < 13


def test_position_ids_are_shared_whatever_the_number_of_rows(tmp_path):
    from genprune.denoising import capture_runs
    from genprune.recovery.pipeline_data import pipeline_data

    teacher = flux_pipeline(tmp_path)
    # 32 px are 16 x 16 latent pixels, 8 x 8 tokens
    options = {"height": 32, "width": 32, "max_sequence_length": 16}
    data = pipeline_data(teacher, teacher, quick(batch_size=8), PROMPTS, None, options)
    tokens = data.clean.shape[1]
    rows = data.rows(range(tokens))
    call = next(capture_runs(teacher, ["abc"], steps=1, **options)).calls[0]
    assert rows.inputs["img_ids"].shape[0] == tokens == rows.inputs["hidden_states"].shape[0]
    for name in ("img_ids", "txt_ids"):
        assert torch.equal(rows.inputs[name], call.inputs[name])
    assert rows.inputs["txt_ids"].ndim == 2 and rows.inputs["pooled_projections"].shape[0] == tokens
    times = rows.inputs["timestep"]
    assert times.shape == (tokens,) and 0 <= float(times.min()) < float(times.max()) <= 1
    assert len(set(times.tolist())) > tokens // 2  # each sample has its own


def test_teacher_latents_are_drawn_once(tmp_path):
    teacher, student, run = pipeline_case("sd", tmp_path)
    other, folder = copy.deepcopy(student), tmp_path / "run"
    first = recovered(student, teacher, quick(prompt_dropout=0.3), output_dir=folder, **run)
    calls = []
    handle = teacher.unet.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    again = tmp_path / "again"
    again.mkdir()
    (folder / "teacher_data").rename(again / "teacher_data")
    second = recovered(other, teacher, quick(prompt_dropout=0.3), output_dir=again, **run)
    handle.remove()
    # one call a step, and two looks at the teacher's features: nothing was drawn or encoded again
    assert len(calls) == 4 + 2
    assert [record["loss"] for record in first.curve] == [record["loss"] for record in second.curve]
    assert same_weights(weights_of(student), weights_of(other))


def test_data_that_do_not_fit_are_refused(tmp_path):
    teacher, student, run = pipeline_case("sd", tmp_path)
    with pytest.raises(BadCalibrationData, match="needs calibration prompts, got none"):
        recovered(student, teacher)
    with pytest.raises(BadCalibrationData, match="3 prompts for 2 latents"):
        recovered(student, teacher, prompts=PROMPTS, data=torch.randn(2, 4, 8, 8))
    with pytest.raises(BadCalibrationData, match="the teacher is a bare UNet2DConditionModel that cannot draw"):
        recovered(student, teacher.unet, prompts=PROMPTS)
    with pytest.raises(GenpruneError, match="prompt_dropout=0.5.*without guidance.*teacher_guidance=5"):
        recovered(student, teacher, quick(prompt_dropout=0.5, teacher_guidance=1.0), prompts=PROMPTS)
    with pytest.raises(BadCalibrationData, match="bare .*got no data"):
        recovered(student.unet, teacher.unet)
    with pytest.raises(BadCalibrationData, match="images .4, 3, 32, 32. and labels .3,."):
        recovered(small_vit(), small_vit(), data=[(torch.zeros(4, 3, 32, 32), torch.zeros(3, dtype=torch.long))])
    with pytest.raises(PlanMismatch, match="share the weights of 'conv_in.weight'; expected a teacher of its own"):
        recovered(teacher, teacher, prompts=PROMPTS)
    with pytest.raises(GenpruneError, match="method is None; expected a way to recover"):
        gp.recovery.recover(student, teacher, None)
    with pytest.raises(NoMatchingSites, match="pairs names 'mid', which is no module of the student"):
        recovered(student, teacher, quick(pairs=(("mid", "mid_block"),)), **run)
    assert not any(module._forward_hooks for module in student.unet.modules())


def test_features_of_other_shapes_are_named(tmp_path):
    teacher, student, run = pipeline_case("sd", tmp_path)
    with pytest.raises(PlanMismatch, match=r"'down_blocks.0' \(student\) have shapes .*'down_blocks.1' \(teacher\)"):
        recovered(student, teacher, quick(pairs=(("down_blocks.0", "down_blocks.1"),)), **run)
    assert not any(module._forward_hooks for pipe in (teacher, student) for module in pipe.unet.modules())


def test_a_dataset_of_single_images_is_read_sample_by_sample():
    class Noisy(torch.utils.data.Dataset):
        """Augments at random: a sample is the same in two runs."""

        def __len__(self):
            return 6

        def __getitem__(self, index):
            return torch.randn(3, 32, 32) + index, index % 5

    teacher, losses = small_vit(), []
    for _ in range(2):
        student = student_of(teacher, "blocks.1:block")
        losses.append([record["loss"] for record in recovered(student, teacher, data=Noisy()).curve])
        torch.rand(3)  # whatever state the global generator has
    assert losses[0] == losses[1]


# ---- options --------------------------------------------------------------------------------------------------------


def test_averaged_weights_are_what_a_run_ends_with():
    teacher = flux().eval()
    data, seen = denoiser_batches(teacher), []
    student, plain = (student_of(teacher, "transformer_blocks.0:block") for _ in range(2))
    look = lambda step, target: seen.append(weights_of(target))  # noqa: E731
    start = weights_of(student)
    recovered(student, teacher, quick(steps=3, ema_decay=0.2), data=data)
    recovered(plain, teacher, quick(steps=3), data=data, validation=look, validation_steps=1)
    name = "transformer_blocks.1.attn.to_q.weight"
    average = start[name].double()
    for step, weights in enumerate(seen):
        decay = min(0.2, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weights[name].double()
    torch.testing.assert_close(weights_of(student)[name].double(), average, rtol=1e-5, atol=1e-7)
    assert not torch.equal(weights_of(student)[name], seen[-1][name])


def test_validation_sees_the_average_and_is_in_the_curve():
    teacher = flux().eval()
    data, seen = denoiser_batches(teacher), []

    def look(step, target):
        seen.append((step, weights_of(target)))
        target.train()  # a callback may
        return {"error": output_error(target, teacher, data)}

    student = student_of(teacher, "transformer_blocks.0:block")
    done = recovered(student, teacher, quick(steps=5, ema_decay=0.5), data=data, validation=look, validation_steps=2)
    assert [step for step, _ in seen] == [2, 4, 5]
    assert same_weights(seen[-1][1], weights_of(student))
    assert [("validation" in record) for record in done.curve] == [False, True, False, True, True]
    other = student_of(teacher, "transformer_blocks.0:block")
    recovered(other, teacher, quick(steps=5, ema_decay=0.5), data=data)
    assert same_weights(weights_of(student), weights_of(other))  # looking changes nothing


@pytest.mark.parametrize("name", ["unet", "flux", "vit"])
def test_gradient_checkpointing_changes_nothing_but_memory(name):
    teacher = {"unet": sd_unet, "flux": flux, "vit": small_vit}[name]().eval()
    data = labelled_images() if name == "vit" else denoiser_batches(teacher)
    removed = {"unet": "mid_block.attentions.0:wrapper", "flux": "transformer_blocks.0:block", "vit": "blocks.1:block"}
    losses = []
    for checkpointed in (False, True):
        student = student_of(teacher, removed[name])
        settings = quick(steps=3, gradient_checkpointing=checkpointed)
        losses.append([record["loss"] for record in recovered(student, teacher, settings, data=data).curve])
        assert not any(getattr(module, "gradient_checkpointing", False) for module in student.modules())
        assert not getattr(student, "grad_checkpointing", False)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_bfloat16_by_accelerate_and_another_precision_afterwards():
    teacher = flux().eval()
    data, losses = denoiser_batches(teacher), {}
    for precision in ("no", "bf16", "no"):
        student = student_of(teacher, "transformer_blocks.0:block")
        done = recovered(student, teacher, quick(mixed_precision=precision), data=data)
        losses.setdefault(precision, []).append(done.curve[-1]["loss"])
        assert next(student.parameters()).dtype == torch.float32
    assert losses["no"][0] == losses["no"][1] != losses["bf16"][0]
    assert losses["bf16"][0] == pytest.approx(losses["no"][0], rel=0.05)
    if not torch.cuda.is_available():
        with pytest.raises(GenpruneError, match="mixed_precision='fp16' on a CPU.*expected a GPU"):
            recovered(student, teacher, quick(mixed_precision="fp16"), data=data)
    with pytest.raises(GenpruneError, match="is in float16; expected float32 weights to train.*lora_rank"):
        recovered(student.half(), teacher, data=data)


def test_an_accelerator_of_ones_own_is_used_and_has_to_agree():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    teacher = flux().eval()
    data, students = denoiser_batches(teacher), [student_of(teacher, "transformer_blocks.0:block") for _ in "abc"]
    recovered(students[0], teacher, data=data)
    try:
        own = Accelerator(cpu=True)
        recovered(students[1], teacher, data=data, accelerator=own)
        with pytest.raises(GenpruneError, match="the accelerator has mixed_precision='no', the method 'bf16'"):
            recovered(students[2], teacher, quick(mixed_precision="bf16"), data=data, accelerator=own)
        with pytest.raises(GenpruneError, match="accelerate refuses mixed_precision='bf16' here"):
            recovered(students[2], teacher, quick(mixed_precision="bf16"), data=data)
        assert AcceleratorState().initialized  # a user's state is not taken away
    finally:
        AcceleratorState._reset_state()
    assert same_weights(weights_of(students[0]), weights_of(students[1]))


def test_a_lora_trains_alone_and_is_saved_as_one(tmp_path):
    teacher, student, run = pipeline_case("sd", tmp_path)
    bare, before = copy.deepcopy(student), weights_of(student)
    settings = quick(lora_rank=2, learning_rate=1e-2)
    done = recovered(student, teacher, settings, output_dir=tmp_path / "run", **run)
    after = weights_of(student)
    for name, value in before.items():
        parts = [key for key in after if key.replace(".base_layer", "") == name]
        assert len(parts) == 1 and torch.equal(after[parts[0]], value), name
    lora = {name: value for name, value in after.items() if ".lora_B." in name}
    assert lora and all(bool(value.any()) for value in lora.values())
    assert done.figures["trained_parameters"] < sum(value.numel() for value in before.values()) / 4

    bare.load_lora_weights(tmp_path / "run")
    inputs = denoiser_batches(student.unet, count=1)[0][0]
    with torch.no_grad():
        assert torch.equal(bare.unet(**inputs).sample, student.unet(**inputs).sample)
    bare.unload_lora_weights()
    assert same_weights(weights_of(bare), before)


@pytest.mark.parametrize("name", ["flux", "vit"])
def test_a_lora_of_a_bare_model_trains_alone(name, tmp_path):
    teacher = randomise_(flux() if name == "flux" else vit())
    student = student_of(teacher, "transformer_blocks.0:block" if name == "flux" else "blocks.1:block")
    data = denoiser_batches(teacher) if name == "flux" else labelled_images()
    before = weights_of(student)
    recovered(student, teacher, quick(lora_rank=2), data=data, output_dir=tmp_path)
    after = {key.replace(".base_layer", ""): value for key, value in weights_of(student).items()}
    assert all(torch.equal(after[key], value) for key, value in before.items())
    lora = [key for key in after if ".lora_B." in key]
    assert lora and all(bool(after[key].any()) for key in lora)
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()
    with pytest.raises(GenpruneError, match="resume=True"):
        recovered(student, teacher, quick(lora_rank=2), data=data, output_dir=tmp_path)


def test_a_recovered_pipeline_saves_and_loads_bit_equal(tmp_path):
    from diffusers import DiffusionPipeline

    teacher, student, run = pipeline_case("sd", tmp_path)
    recovered(student, teacher, **run)
    student.save_pretrained(tmp_path / "small")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "small")
    assert type(loaded.unet) is type(student.unet) and type(loaded.unet).__name__ == "PrunedUNet2DConditionModel"
    inputs = denoiser_batches(student.unet, count=1)[0][0]
    with torch.no_grad():
        assert torch.equal(loaded.unet(**inputs).sample, student.unet(**inputs).sample)


def test_the_curve_is_on_disk_line_by_line(tmp_path):
    teacher, student, run = pipeline_case("flux", tmp_path)
    done = recovered(student, teacher, output_dir=tmp_path / "run", **run)
    lines = [json.loads(line) for line in (tmp_path / "run" / "curve.jsonl").read_text().splitlines()]
    assert lines == done.curve and [line["step"] for line in lines] == [1, 2, 3, 4]
    streams = {f"{ours}[{stream}]" for ours, _ in done.pairs for stream in range(2)}
    assert set(lines[0]["terms"]) == {"task", "output"} | streams
    total = sum(term["weighted"] for term in lines[0]["terms"].values())
    assert lines[0]["loss"] == pytest.approx(total)
