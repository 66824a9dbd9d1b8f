"""The embedded pipeline loads with stock diffusers and draws; the grader reads real scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from genprune import miniature
from genprune.errors import GenpruneError
from genprune.miniature import grader as grader_module
from genprune.miniature import grammar

HERE = Path(grader_module.__file__).parent
needs_pipeline = pytest.mark.skipif(
    not (HERE / "pipeline" / "model_index.json").is_file(), reason="this checkout holds no trained pipeline"
)
needs_grader = pytest.mark.skipif(
    not (HERE / grader_module.WEIGHTS).is_file(), reason="this checkout holds no trained grader"
)


def pictures(scenes: list[grammar.Scene]) -> torch.Tensor:
    return torch.from_numpy(np.stack([grammar.render(s) for s in scenes])).permute(0, 3, 1, 2)


@needs_grader
def test_grader_reads_real_held_out_scenes():
    scenes = miniature.scenes("test", 300, seed=9)
    figures, floor = grader_module.grade(pictures(scenes), scenes), grader_module.chance(scenes, rounds=3)
    assert figures.keys() == floor.keys() == {*grader_module.ATTRIBUTES, "all"}
    # the report says 99 % or so; 90 % leaves room for 300 scenes and for a retrained grader
    assert all(value > 0.9 for value in figures.values()), figures
    assert floor["all"] < 0.01 and floor["object"] < 0.2


@needs_grader
def test_grader_takes_uint8_and_float_alike():
    grader = miniature.load_grader()
    images = pictures(miniature.scenes("dev", 4))
    features = grader.features(images)
    assert features.shape == (4, grader.num_features)
    # uint8 / 255 is the same float32 division either way
    assert torch.equal(features, grader.features(images.float() / 255))
    with pytest.raises(ValueError, match="resize first"):
        grader(images[..., :32])


def test_labels_count_only_what_a_caption_says():
    scenes = [
        grammar.Scene("single", "cat", "red", size="small", position="left"),
        grammar.Scene("group", "cat", "red", count=3),
        grammar.Scene("pair", "cat", "red", count=2, other="dog"),
    ]
    truth = grader_module.labels(scenes)
    mentioned = grader_module.said(truth)
    assert mentioned["position"].tolist() == mentioned["size"].tolist() == [True, False, False]
    assert mentioned["other"].tolist() == [False, True, True]
    assert all(mentioned[name].all() for name in ("object", "count", "background", "texture"))
    assert set(grader_module.compare(truth, truth).values()) == {1.0}
    # a wrong position of a group is not an error, a wrong count is
    wrong = {**truth, "position": torch.tensor([0, 0, 0])}
    assert grader_module.compare(wrong, truth)["all"] == 1.0
    wrong = {**truth, "count": torch.tensor([0, 0, 1])}
    assert grader_module.compare(wrong, truth)["all"] == pytest.approx(2 / 3)


def test_grade_refuses_unequal_numbers():
    with pytest.raises(ValueError, match="one picture for each"):
        grader_module.grade(torch.zeros(2, 3, 64, 64), miniature.scenes("dev", 3), grader_module.Grader())


@needs_pipeline
@pytest.mark.parametrize(
    ("name", "pipeline", "steps"),
    [("unet", "StableDiffusionPipeline", 8), ("mmdit", "FluxPipeline", 8), ("mmdit-4-step", "FluxPipeline", 4)],
)
def test_stock_pipeline_draws_what_it_is_asked(name: str, pipeline: str, steps: int):
    pytest.importorskip("diffusers")
    pipe = miniature.load_pipeline(name)
    assert type(pipe).__name__ == pipeline and type(pipe).__module__.startswith("diffusers.")
    pipe.set_progress_bar_config(disable=True)
    scenes = miniature.scenes("test", 6, seed=2)
    options = miniature.call_options(name) | {"num_inference_steps": steps}
    if "negative_prompt" in options:
        options["negative_prompt"] = [options["negative_prompt"]] * 6
    drawn = pipe(
        [miniature.caption(scene) for scene in scenes],
        generator=[torch.Generator().manual_seed(i) for i in range(6)],
        output_type="np",
        **options,
    ).images
    assert drawn.shape == (6, 64, 64, 3)
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2)
    figures = grader_module.grade(images, scenes)
    # chance is 1/8 and 1/2: six pictures of an untrained model pass both less than once in ten thousand tries
    assert figures["background"] >= 0.75 and figures["texture"] >= 0.75, figures


@needs_pipeline
def test_the_student_is_another_transformer_in_the_same_pipeline():
    pytest.importorskip("diffusers")
    teacher, student = miniature.load_pipeline("mmdit"), miniature.load_pipeline("mmdit-4-step")
    assert student.transformer.config.num_layers == teacher.transformer.config.num_layers
    assert not torch.equal(student.transformer.proj_out.weight, teacher.transformer.proj_out.weight)
    assert torch.equal(student.vae.decoder.conv_in.weight, teacher.vae.decoder.conv_in.weight)
    assert student.default_sample_size * student.vae_scale_factor == 64


def test_unknown_miniature_names_the_known_ones():
    with pytest.raises(GenpruneError, match="no miniature 'mmdits', nearest name: 'mmdit'.*unet, mmdit"):
        miniature.load_pipeline("mmdits")
    with pytest.raises(GenpruneError, match="expected one of unet"):
        miniature.call_options("flux")


@needs_pipeline
def test_embedded_files_are_small_and_safe():
    files = [path for path in HERE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    for pipeline in ("pipeline", "pipeline_mmdit"):
        assert sum(path.stat().st_size for path in files if pipeline in path.parts) <= 20 * 2**20
    assert max(path.stat().st_size for path in files) <= 7.5e6
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pkl", ".pth", ".ckpt"}]
    assert (HERE / "LICENSES").is_dir() and (HERE / "MODEL_CARD.md").is_file()


@needs_pipeline
def test_every_word_is_one_token():
    tokenizer = miniature.load_pipeline().tokenizer
    for text in miniature.prompts("train", 200):
        # start, words, one comma, end
        assert len(tokenizer(text).input_ids) == len(text.split()) + 3 <= tokenizer.model_max_length


def test_missing_pipeline_says_what_to_do(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(miniature, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="reinstall genprune"):
        miniature.pipeline_dir()


@needs_pipeline
def test_text_weights_carry_the_names_that_every_transformers_reads():
    from safetensors import safe_open

    with safe_open(HERE / "pipeline" / "text_encoder" / "model.safetensors", "pt") as file:
        # without the prefix, transformers 4 would start from random weights
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118
    text_encoder = miniature.load_pipeline().text_encoder
    # trained embeddings are far from the 0.02 of fresh ones
    assert text_encoder.get_input_embeddings().weight.std() > 0.03
