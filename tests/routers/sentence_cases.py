"""A small real sentence encoder on disk: a BERT with random weights, a WordPiece vocabulary of a few words."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WORDS = (
    "a an the two three large small cat dog fox house bird tree ship boat red blue green on in of left right".split()
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SCENES = [
    f"{count} {size} {colour} {thing}"
    for count in ("a", "two", "three")
    for size in ("large", "small")
    for colour in ("red", "blue", "green")
    for thing in ("cat", "dog", "fox", "house", "bird", "tree")
]


def sentence_folder(folder: Path, pooling: str = "mean", width: int = 32, seed: int = 0, longest: int = 24) -> Path:
    """A folder as sentence-transformers writes it: mean pooling, then a normalisation that routers do not use."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS, ",", "##s"]) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS) + 2,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=64,
    )
    model = BertModel(config)
    with torch.no_grad():  # words as far from each other as trained ones: the default lets all sentences look alike
        model.embeddings.word_embeddings.weight.mul_(50)
    model.save_pretrained(folder)
    types = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in types]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest}))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {
        f"pooling_mode_{name}_token{'' if name == 'cls' else 's'}": name == pooling for name in ("cls", "mean", "max")
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": width, **modes}))
    return folder
