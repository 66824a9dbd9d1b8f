"""Sentence encoders: what their folders say, what pipelines have, one prompt at a time."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import tiny_pipelines
import torch
from sentence_cases import SCENES, sentence_folder
from torch import nn

import genprune as gp
from genprune.routers.encoders import (
    PooledTextEncoder,
    SentenceEncoder,
    TransformersEncoder,
    check_encoder,
    encoder_of,
    recorded_encoder,
)
from genprune.routers.fingerprints import file_fingerprint, same_weights, weights_fingerprint
from genprune.routers.prompts import BadPrompt

PROMPTS = ["a cat", "two dogs and a red fox", "old house", "z"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sentence_folder(tmp_path_factory.mktemp("encoder") / "sentences")


@pytest.fixture(scope="module")
def sentences(folder):
    return TransformersEncoder(folder)


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return tiny_pipelines.sd_pipeline(tmp_path_factory.mktemp("sd"))


# ---- sentence folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_are_the_pooled_states_of_the_model(tmp_path, pooling):
    from transformers import AutoModel, AutoTokenizer

    folder = sentence_folder(tmp_path / "encoder", pooling)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    encoder = TransformersEncoder(folder)
    for prompt, row in zip(SCENES[:5], encoder.encode(SCENES[:5])):
        with torch.no_grad():
            states = model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0]
        expected = states[0] if pooling == "cls" else states.mean(0)
        assert torch.allclose(row, expected, atol=1e-6)  # the same passes in another order of sums
        assert abs(row.norm() - 1) > 0.1  # the folder's normalisation is not for routers
    assert (encoder.pooling, encoder.dim) == (pooling, 32)
    assert isinstance(encoder, SentenceEncoder)


def test_a_vector_does_not_depend_on_its_batch(sentences):
    prompts = ["cat", "two large green fox on the left of a small house", *SCENES, "a red bird in a tree"]
    together = sentences.encode(prompts)
    assert together.dtype == torch.float32 and together.shape == (len(prompts), sentences.dim)
    backwards = sentences.encode(prompts[::-1]).flip(0)
    alone = torch.cat([sentences.encode([prompt]) for prompt in prompts])
    assert torch.equal(together, backwards) and torch.equal(together, alone)
    padded = sentences.encode(prompts, batch_size=7)
    assert torch.allclose(padded, alone, atol=1e-5)  # padding is masked; sums differ in the last digits
    with pytest.raises(gp.GenpruneError, match="batch_size=0"):
        sentences.encode(SCENES, batch_size=0)


def test_encoding_draws_nothing_at_random(sentences, sd):
    for encoder in (sentences, PooledTextEncoder(sd)):
        torch.manual_seed(0)
        before = torch.random.get_rng_state()
        first = encoder.encode(PROMPTS)
        assert torch.equal(before, torch.random.get_rng_state())
        torch.manual_seed(1)
        assert torch.equal(first, encoder.encode(PROMPTS))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(first, encoder.encode(PROMPTS))


def test_a_long_prompt_is_read_up_to_the_limit_and_told_once(sentences, caplog):
    assert sentences.max_length == 24  # of sentence_bert_config.json
    long = "a large red cat " * 625  # 10,000 characters
    with caplog.at_level(logging.WARNING, "genprune"):
        first = sentences.encode([long])
        again = sentences.encode([long, "a cat"])
        assert torch.equal(first[0], again[0])
        assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "10000 characters is routed by its first 22 tokens; the last 2478 are left out" in caplog.text
    assert torch.equal(first, sentences.encode([" ".join(long.split()[:22])]))
    assert not torch.equal(first, sentences.encode([" ".join(long.split()[:21])]))


def test_unknown_words_are_counted(sentences):
    assert sentences.unknown_share("a red cat") == 0
    assert sentences.unknown_share("a red zebra quagga") == 0.5
    assert sentences.unknown_share("แมวตัวใหญ่") == 1
    assert sentences.unknown_share("\u200b") == 1  # no token at all


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        ([], "no prompt to route"),
        (["a cat", ""], "prompt 1 is blank.*expert="),
        (["a cat", " \n\t"], "prompt 1 is blank.*expert="),
        (["a cat", None], "prompt 1 is a NoneType.*expert="),
        ([["a", "b"]], "prompt 0 is a list.*expert="),
        (7, "are a int"),
        (b"a cat", "are a bytes"),
    ],
)
def test_what_is_no_prompt_is_refused(sentences, prompts, match):
    with pytest.raises(BadPrompt, match=match):
        sentences.encode(prompts)
    assert issubclass(BadPrompt, gp.BadCalibrationData)


def test_one_string_is_one_prompt(sentences):
    assert torch.equal(sentences.encode("a cat"), sentences.encode(["a cat"]))


def edited(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_that_is_not_understood_is_refused(tmp_path):
    folder = sentence_folder(tmp_path / "encoder")
    pooling = folder / "1_Pooling" / "config.json"
    edited(pooling, pooling_mode_max_tokens=True)
    with pytest.raises(gp.UnsupportedModel, match=r"mean_tokens|mean \+ max_tokens.*expected one of mean, cls"):
        TransformersEncoder(folder)
    edited(pooling, pooling_mode_max_tokens=False)
    modules = json.loads((folder / "modules.json").read_text())
    dense = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*modules, dense]))
    with pytest.raises(gp.UnsupportedModel, match="models.Dense'; expected Transformer, Pooling, Normalize"):
        TransformersEncoder(folder)
    (folder / "modules.json").write_text("[{")
    with pytest.raises(gp.PlanMismatch, match="modules.json' is not whole JSON"):
        TransformersEncoder(folder)


def test_only_whole_safetensors_weights_are_loaded(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = sentence_folder(tmp_path / "encoder")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if "layer.1.output.dense" not in k}, weights, {"format": "pt"})
    with pytest.raises(gp.PlanMismatch, match="lacks 2 weights of its BertModel .*random values"):
        TransformersEncoder(folder)
    save_file({k: v for k, v in tensors.items() if not k.startswith("pooler.")}, weights, {"format": "pt"})
    TransformersEncoder(folder)  # nothing reads BERT's pooler
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(gp.PlanMismatch, match="does not load as a text encoder"):
        TransformersEncoder(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(gp.PlanMismatch, match="lacks a config.json or weights in safetensors"):
        TransformersEncoder(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(gp.PlanMismatch, match="there is no folder '.*nowhere'; expected .* hub id"):
        TransformersEncoder(tmp_path / "nowhere")


def test_a_folder_without_pooling_is_averaged(tmp_path):
    folder = sentence_folder(tmp_path / "encoder", "cls")
    (folder / "modules.json").unlink()
    (folder / "sentence_bert_config.json").unlink()
    (folder / "1_Pooling" / "config.json").unlink()
    encoder = TransformersEncoder(folder)
    assert (encoder.pooling, encoder.max_length) == ("mean", 64)


# ---- pipelines ------------------------------------------------------------------------------------------------------


def test_sd_pools_as_its_text_encoder_does(sd):
    encoder = PooledTextEncoder(sd)
    assert encoder.model is sd.text_encoder  # in float32 on the CPU already: no copy
    for prompt, row in zip(PROMPTS, encoder.encode(PROMPTS)):
        tokens = sd.tokenizer(prompt, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
        with torch.no_grad():
            expected = sd.text_encoder(tokens.input_ids).pooler_output[0]
        assert torch.allclose(row, expected, atol=1e-5)
    assert encoder.encode(PROMPTS).shape == (4, encoder.dim) == (4, 24)


def test_flux_and_sd3_pool_as_their_pipelines_do(tmp_path):
    (tmp_path / "flux").mkdir(), (tmp_path / "sd3").mkdir()
    flux, sd3 = tiny_pipelines.flux_pipeline(tmp_path / "flux"), tiny_pipelines.sd3_pipeline(tmp_path / "sd3")
    with torch.no_grad():
        expected = flux.encode_prompt("a cat", None, max_sequence_length=16)[1]
    assert torch.allclose(PooledTextEncoder(flux).encode(["a cat"]), expected, atol=1e-5)
    with torch.no_grad():
        expected = sd3.encode_prompt("a cat", None, None, do_classifier_free_guidance=False, max_sequence_length=16)[2]
    encoder = PooledTextEncoder(sd3)
    assert encoder.pooling == "text_embeds"
    assert torch.allclose(encoder.encode(["a cat"]), expected[:, : encoder.dim], atol=1e-5)


def test_a_t5_alone_is_averaged_over_the_tokens(tmp_path):
    pipe = tiny_pipelines.pixart_sigma_pipeline(tmp_path)
    encoder = PooledTextEncoder(pipe)
    ids = torch.tensor([pipe.tokenizer("two dogs")["input_ids"]])
    with torch.no_grad():
        expected = pipe.text_encoder(ids).last_hidden_state.mean(1)
    assert torch.allclose(encoder.encode(["two dogs"]), expected, atol=1e-6)
    assert torch.allclose(encoder.encode(["a", "two dogs"], batch_size=2)[1:], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["unet", "mmdit"])
def test_the_miniatures_have_an_encoder(name):
    from genprune import miniature

    encoder = PooledTextEncoder(miniature.load_pipeline(name))
    vectors = encoder.encode(miniature.prompts("train", 3))
    assert vectors.shape == (3, 128) and vectors.isfinite().all()
    assert encoder.unknown_share("แมว") == 1


def test_a_pipeline_without_text_has_no_encoder():
    with pytest.raises(gp.UnsupportedModel, match="DiTPipeline has no text encoder.*Pass encoder="):
        PooledTextEncoder(tiny_pipelines.dit_pipeline())


def test_vectors_stay_while_the_pipeline_changes(tmp_path, caplog):
    pipe = tiny_pipelines.sd_pipeline(tmp_path)
    encoder = PooledTextEncoder(pipe)
    twin = copy.deepcopy(encoder)
    first = encoder.encode(PROMPTS)
    assert torch.equal(twin.encode(PROMPTS), first)
    half = PooledTextEncoder(pipe)
    pipe.to(torch.bfloat16)
    with caplog.at_level(logging.WARNING, "genprune"):
        vectors = half.encode(PROMPTS)
    assert "was cast to torch.bfloat16 after the router took it" in caplog.text
    assert vectors.dtype == torch.float32
    assert torch.allclose(vectors, first, atol=0.1) and not torch.equal(vectors, first)
    assert pipe.text_encoder.dtype == torch.bfloat16  # the pipeline's own is not touched
    late = PooledTextEncoder(pipe)
    assert late.model.dtype == torch.float32 and torch.equal(late.encode(PROMPTS), vectors)


def test_an_adapter_on_a_shared_text_encoder_is_refused(tmp_path):
    from peft import LoraConfig

    pipe = tiny_pipelines.sd_pipeline(tmp_path)
    encoder = PooledTextEncoder(pipe)
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(gp.PlanMismatch, match="text_encoder has .* tensors, and had .* Unload the adapter"):
        encoder.encode(PROMPTS)


def test_an_offloaded_text_encoder_gives_a_copy_without_hooks(tmp_path):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Elsewhere(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            raise AssertionError("the router ran the pipeline's offloaded module")

    pipe = tiny_pipelines.sd_pipeline(tmp_path)
    early = PooledTextEncoder(pipe)
    first = early.encode(PROMPTS)
    add_hook_to_module(pipe.text_encoder, Elsewhere())
    assert torch.equal(early.encode(PROMPTS), first)
    assert torch.equal(PooledTextEncoder(pipe).encode(PROMPTS), first)


# ---- which encoder --------------------------------------------------------------------------------------------------


def test_an_encoder_is_named_in_three_ways(sd, folder, sentences):
    assert isinstance(encoder_of(None, sd), PooledTextEncoder)
    assert encoder_of(sentences) is sentences
    assert torch.equal(encoder_of(str(folder)).encode(["a cat"]), sentences.encode(["a cat"]))
    with pytest.raises(gp.UnsupportedModel, match="neither an encoder nor a pipeline.*Pass pipe="):
        encoder_of(None)
    with pytest.raises(gp.UnsupportedModel, match="encoder is a Linear; expected an object with dim"):
        encoder_of(nn.Linear(2, 2))


def test_another_encoder_is_known_by_its_weights_and_words(tmp_path, folder, sentences, sd):
    recorded = json.loads(json.dumps(sentences.to_json()))
    check_encoder(recorded, TransformersEncoder(folder))
    moved = tmp_path / "moved"
    folder.rename(moved)
    try:
        with pytest.raises(gp.PlanMismatch, match="cannot be loaded from there .*encoder="):
            recorded_encoder(recorded)
        check_encoder(recorded, TransformersEncoder(moved))  # where it lies does not count
    finally:
        moved.rename(folder)
    assert torch.equal(recorded_encoder(recorded).encode(["a cat"]), sentences.encode(["a cat"]))
    with pytest.raises(gp.PlanMismatch, match="has weights .*router was trained with.*Pass that one as encoder="):
        check_encoder(recorded, TransformersEncoder(sentence_folder(tmp_path / "other", seed=1)))
    with pytest.raises(gp.PlanMismatch, match="has pooling 'cls'"):
        check_encoder(recorded, TransformersEncoder(sentence_folder(tmp_path / "cls", "cls")))
    words = sentence_folder(tmp_path / "words")
    tokenizer = words / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"cat"', '"cow"'))
    (words / "vocab.txt").write_text((words / "vocab.txt").read_text().replace("cat", "cow"))
    with pytest.raises(gp.PlanMismatch, match="has vocabulary_sha256"):
        check_encoder(recorded, TransformersEncoder(words))
    with pytest.raises(gp.PlanMismatch, match="has kind 'pooled'"):
        check_encoder(recorded, PooledTextEncoder(sd))
    with pytest.raises(gp.PlanMismatch, match=r"text_encoder of its pipeline.*pipe=pipe"):
        recorded_encoder(PooledTextEncoder(sd).to_json())


def test_weights_are_known_again_after_a_cast():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    whole = weights_fingerprint(model)
    for dtype in (torch.float16, torch.bfloat16):
        cast = copy.deepcopy(model).to(dtype)
        assert same_weights(whole, weights_fingerprint(cast))
        assert same_weights(whole, weights_fingerprint(cast.float()))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight[0, 0] += 0.1
    assert not same_weights(whole, weights_fingerprint(other))
    assert weights_fingerprint(model.to("meta")) is None


def test_files_are_told_apart(tmp_path):
    (tmp_path / "a").write_bytes(b"1" * 1000)
    (tmp_path / "b").write_bytes(b"1" * 999 + b"2")
    assert file_fingerprint(tmp_path / "a") != file_fingerprint(tmp_path / "b")
    with (tmp_path / "large").open("wb") as file:
        file.truncate((1 << 26) + 5)
    before = file_fingerprint(tmp_path / "large")
    with (tmp_path / "large").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert file_fingerprint(tmp_path / "large") != before
