"""The third task of LD-Pruner: an AudioLDM-shaped pipeline, pruned by the statistics of its latents."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import genprune as gp


@pytest.fixture(scope="module")
def audio_pipeline(tmp_path_factory):
    """Mel spectrograms of 4 bins, text by a CLAP encoder whose embedding is the class of the U-Net."""
    from diffusers import AudioLDMPipeline, AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import (
        ClapTextConfig,
        ClapTextModelWithProjection,
        RobertaTokenizer,
        SpeechT5HifiGan,
        SpeechT5HifiGanConfig,
    )

    folder = tmp_path_factory.mktemp("audio")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "\u0120", *letters]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(16, 32),
        attention_head_dim=4,
        norm_num_groups=8,
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=16,
        class_embeddings_concat=True,
    )
    text = ClapTextConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=16,
    )
    vocoder = SpeechT5HifiGanConfig(
        model_in_dim=8,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 3],
        resblock_dilation_sizes=[[1], [1]],
        normalize_before=False,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    pipe = AudioLDMPipeline(
        vae=vae.eval(),
        text_encoder=ClapTextModelWithProjection(text).eval(),
        tokenizer=RobertaTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8),
        unet=unet.eval(),
        scheduler=DDIMScheduler(clip_sample=False),
        vocoder=SpeechT5HifiGan(vocoder).eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


OPTIONS = {"audio_length_in_s": 0.016}


def test_an_audio_pipeline_is_scored_cut_and_draws(audio_pipeline):
    method = gp.LDPruner(keep=0.8, of="macs", trajectories=4, trajectory_steps=2, steps=2, timesteps=1, batch_size=2)
    scores = gp.score(audio_pipeline, method, prompts=["a b", "c d"], pipeline_options=OPTIONS, progress=False)
    assert any("=" in name for name in scores.losses) and any(name.endswith(":block") for name in scores.losses)
    plan = scores.plan()
    small = gp.cut(copy.deepcopy(audio_pipeline.unet), plan)
    costs = gp.count_costs(small, **plan.operating_point)
    assert (costs.params, costs.macs) == (plan.figures["params"], plan.figures["macs"])
    assert plan.made_by["budget"]["reached"] == pytest.approx(0.8, abs=0.06)
    pipe = copy.copy(audio_pipeline)
    pipe.unet = small
    heard = pipe("a b", num_inference_steps=2, **OPTIONS).audios
    assert heard.shape == audio_pipeline("a b", num_inference_steps=2, **OPTIONS).audios.shape


def test_the_statistics_are_of_latents_not_of_sound(audio_pipeline):
    from genprune.layers.latent_stats import LatentStatistics

    options = {"num_inference_steps": 2, **OPTIONS}
    statistics = LatentStatistics(
        audio_pipeline,
        gp.find_sites(audio_pipeline),
        ["a b"],
        samples=3,
        seed=0,
        batch_size=2,
        options=options,
    )
    latents = statistics.latents()
    assert latents.shape[:2] == (3, 4) and latents.ndim == 4
    assert torch.equal(latents, statistics.latents())
