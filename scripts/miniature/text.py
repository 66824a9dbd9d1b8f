"""The miniature's own tokenizer (a few hundred entries, loads as a stock `CLIPTokenizer`) and its text encoder."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(corpus: list[str], folder: Path, max_length: int, vocab_size: int = 1000) -> CLIPTokenizer:
    """Learn a byte-pair vocabulary from `corpus` and return it as a stock tokenizer.

    Args:
        corpus: captions. With fewer distinct words than `vocab_size` allows, every word becomes one token.
        folder: `vocab.json`, `merges.txt` and the tokenizer's configuration are written here.
        max_length: tokens of a caption, start and end included.
        vocab_size: upper limit of entries.
    """
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    # the stock CLIP tokenizer splits words from punctuation and digits from each other, so learning must as well
    pattern = Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789,.-'")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        min_frequency=1,
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.lower() for text in corpus), trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    vocabulary = dict(learned["vocab"])
    for token in [f"{letter}</w>" for letter in letters] + [START, END]:
        vocabulary.setdefault(token, len(vocabulary))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in learned["merges"]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    stock = CLIPTokenizer.from_pretrained(
        folder, model_max_length=max_length, bos_token=START, eos_token=END, pad_token=END, unk_token=END
    )
    stock.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def build_text_encoder(tokenizer: CLIPTokenizer, hidden_size: int = 128, layers: int = 2) -> CLIPTextModel:
    """An untrained CLIP text encoder for this vocabulary, head dimension 32."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=hidden_size * 2,
            projection_dim=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=max(1, hidden_size // 32),
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]):
    """Token ids of captions, int64 tensor `(B, max_length)`, as the stock pipeline makes them."""
    return tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
