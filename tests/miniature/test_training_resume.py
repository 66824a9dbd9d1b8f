"""An interrupted and resumed training ends with bit-identical weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
sys.path.insert(0, str(Path(__file__).parents[2]))

from diffusers import FluxTransformer2DModel  # noqa: E402

from genprune.miniature.grader import Grader  # noqa: E402
from scripts.miniature.autoencoder import AutoencoderStage, build_autoencoder  # noqa: E402
from scripts.miniature.checkpoints import find_checkpoint  # noqa: E402
from scripts.miniature.data import shuffled_rows  # noqa: E402
from scripts.miniature.denoiser import DenoiserStage, unet_architecture  # noqa: E402
from scripts.miniature.distillation import DistillationStage, teacher_pairs  # noqa: E402
from scripts.miniature.grading import GraderStage  # noqa: E402
from scripts.miniature.loop import LoopConfig, learning_rate_at, train  # noqa: E402
from scripts.miniature.mmdit import (  # noqa: E402
    FlowStage,
    build_t5,
    build_t5_tokenizer,
    mmdit_architecture,
    start_at_identity,
)
from scripts.miniature.text import build_text_encoder, build_tokenizer, tokenize  # noqa: E402

CAPTIONS = ["a cat, red background", "a dog, blue background", "two cats, blue background", "two dogs, red background"]


def tiny_denoiser(folder: Path) -> DenoiserStage:
    from diffusers import DDIMScheduler

    architecture = unet_architecture((32, 32), (1, 1), text_hidden_size=32, norm_num_groups=8)
    tokenizer = build_tokenizer(CAPTIONS, folder / "tokenizer", architecture.text_length)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(10, 4, 8, 8, generator=generator).half()
    tokens = tokenize(tokenizer, [CAPTIONS[i % 4] for i in range(10)])
    torch.manual_seed(0)
    denoiser = architecture.denoiser_class(**{**architecture.denoiser_config, "sample_size": 8})
    return DenoiserStage(
        denoiser,
        build_text_encoder(tokenizer, 32, layers=1),
        build_autoencoder((8, 8, 8)),
        tokenizer,
        DDIMScheduler(**architecture.scheduler_config),
        {"latents": latents, "tokens": tokens},
        CAPTIONS,
        batch_size=4,
    )


def tiny_autoencoder(folder: Path) -> AutoencoderStage:
    torch.manual_seed(0)
    return AutoencoderStage(build_autoencoder((8, 8, 8)), batch_size=2)


def tiny_decoder(folder: Path) -> AutoencoderStage:
    torch.manual_seed(0)
    return AutoencoderStage(build_autoencoder((8, 8, 8)), batch_size=2, decoder_only=True, latent_noise=0.1)


def tiny_grader(folder: Path) -> GraderStage:
    torch.manual_seed(0)
    return GraderStage(Grader(width=8, num_features=16), batch_size=4)


def tiny_flow(folder: Path) -> FlowStage:
    tokenizers = {
        "tokenizer": build_tokenizer(CAPTIONS, folder / "tokenizer", 16),
        "tokenizer_2": build_t5_tokenizer(CAPTIONS, folder / "tokenizer_2", 16),
    }
    torch.manual_seed(0)
    modules = {
        "text_encoder": build_text_encoder(tokenizers["tokenizer"], 128, layers=1),
        "text_encoder_2": build_t5(tokenizers["tokenizer_2"], layers=1),
        "denoiser": FluxTransformer2DModel(**mmdit_architecture(32, 1, 1).denoiser_config),
    }
    start_at_identity(modules["denoiser"])
    generator = torch.Generator().manual_seed(1)
    pool = {"latents": torch.randn(10, 4, 16, 16, generator=generator).half()}
    texts = [CAPTIONS[i % 4] for i in range(10)]
    pool |= {
        "tokens": tokenize(tokenizers["tokenizer"], texts),
        "tokens_2": tokenize(tokenizers["tokenizer_2"], texts),
    }
    return FlowStage(modules, build_autoencoder((8, 8, 8)), tokenizers, pool, CAPTIONS, batch_size=4)


def tiny_distillation(folder: Path) -> DistillationStage:
    teacher = tiny_flow(folder)
    texts = [CAPTIONS[i % 4] for i in range(10)]
    latents = teacher_pairs(
        teacher.denoiser, teacher.conditions, teacher.tokenizers, texts, folder / "pairs.safetensors", batch_size=4
    )
    return DistillationStage(
        teacher.denoiser, teacher.conditions, teacher.tokenizers, teacher.vae, texts, latents, batch_size=4
    )


STAGES = [tiny_autoencoder, tiny_decoder, tiny_denoiser, tiny_grader, tiny_flow, tiny_distillation]


def config(folder: Path, **changes) -> LoopConfig:
    # 7 batches of 4 pass the 10 cached pictures more than twice: the resume is in another epoch than the start
    fields = {"max_train_steps": 7, "learning_rate": 1e-2, "lr_warmup_steps": 2, "checkpointing_steps": 3}
    return LoopConfig(output_dir=folder, preview_steps=1000, **{**fields, **changes})


@pytest.mark.parametrize("build", STAGES)
def test_resumed_run_equals_uninterrupted_run(tmp_path: Path, build):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    stage = build(tmp_path)
    stage.preview = lambda folder, step: None
    before = {name: tensor.clone() for name, tensor in stage.modules.state_dict().items()}
    train(stage, config(whole))

    stage = build(tmp_path)
    stage.preview = lambda folder, step: None
    ordinary = stage.loss

    def interrupted(step: int, *process: int):
        if step == 5:
            raise KeyboardInterrupt
        return ordinary(step, *process)

    stage.loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        train(stage, config(broken))
    assert find_checkpoint(broken, "latest").name == "checkpoint-3"

    torch.manual_seed(123)  # a resumed process has another random state, and freshly built weights
    stage = build(tmp_path)
    torch.nn.init.normal_(next(iter(stage.modules.parameters())))
    stage.preview = lambda folder, step: None
    train(stage, config(broken), "latest")

    for name in ("model", "ema", "optimizer"):
        expected = load_file(whole / "checkpoint-7" / f"{name}.safetensors")
        found = load_file(broken / "checkpoint-7" / f"{name}.safetensors")
        assert expected.keys() == found.keys()
        different = [key for key in expected if not torch.equal(expected[key], found[key])]
        assert not different
    after = load_file(whole / "checkpoint-7" / "model.safetensors")
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_decoder_stage_leaves_the_encoder_alone(tmp_path: Path):
    stage = tiny_decoder(tmp_path)
    stage.preview = lambda folder, step: None
    before = {name: tensor.clone() for name, tensor in stage.vae.encoder.state_dict().items()}
    train(stage, config(tmp_path, max_train_steps=2))
    assert all(torch.equal(before[name], tensor) for name, tensor in stage.vae.encoder.state_dict().items())


def test_half_written_checkpoints_are_not_resumed_from(tmp_path: Path):
    (tmp_path / ".writing-9").mkdir()
    assert find_checkpoint(tmp_path, "latest") is None
    with pytest.raises(FileNotFoundError, match="pass a checkpoint folder or 'latest'"):
        find_checkpoint(tmp_path, "checkpoint-9")


def test_every_epoch_sees_every_row_once():
    rows = torch.cat([shuffled_rows(step, 4, 10, seed=0) for step in range(5)])
    first, second = rows[:10].tolist(), rows[10:].tolist()
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_learning_rate_warms_up_and_ends_at_nothing(tmp_path: Path):
    for name in ("cosine", "warmup_stable_decay"):
        rates = [
            learning_rate_at(step, config(tmp_path, lr_scheduler=name, max_train_steps=100)) for step in range(100)
        ]
        assert rates[0] < rates[1] and max(rates) <= 1e-2 and rates[-1] < 0.05 * max(rates)
    with pytest.raises(ValueError, match="choose cosine"):
        learning_rate_at(0, config(tmp_path, lr_scheduler="linear"))
