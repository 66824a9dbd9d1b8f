"""A sentence encoder's folder: its tokenizer, its text model, and what its configuration says about pooling."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genprune.errors import PlanMismatch, UnsupportedModel

POOLINGS = ("mean", "cls")
# Weights in safetensors, and what a tokenizer and the configurations are made of; nothing that is unpickled.
_HUB_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")
_OLD_NAMES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


@dataclass(frozen=True)
class SentenceFolder:
    """What was found: the model is frozen, in evaluation mode and float32 on the CPU."""

    tokenizer: Any
    model: nn.Module
    pooling: str
    max_length: int | None


def load_sentence_folder(folder_or_hub: str | os.PathLike) -> SentenceFolder:
    """Load a sentence encoder.

    Args:
        folder_or_hub: a folder with a text model, or a hub id of one. `modules.json`, `1_Pooling/config.json` and
            `sentence_bert_config.json` are read where they are; without them tokens are averaged.

    Raises:
        UnsupportedModel: another pooling than one of `POOLINGS`, or further layers after it.
        PlanMismatch: no such folder or repository, no safetensors weights in it, or some of them missing.
    """
    folder = _local(folder_or_hub)
    text, pooling = _modules(folder)
    if not (text / "config.json").is_file() or not any(text.glob("*.safetensors")):
        raise PlanMismatch(
            f"'{text}' lacks a config.json or weights in safetensors; expected both, because other weight files can "
            "run code when they are read. Save the model with safe serialization, or pass another folder."
        )
    settings = _json(text / "sentence_bert_config.json")
    tokenizer, model = _load(text)
    limit = settings.get("max_seq_length")
    return SentenceFolder(tokenizer, model, pooling, int(limit) if limit else None)


def _local(folder_or_hub: str | os.PathLike) -> Path:
    if os.path.isdir(folder_or_hub):
        return Path(folder_or_hub)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(folder_or_hub)):
        raise PlanMismatch(
            f"there is no folder '{folder_or_hub}'; expected the folder of a sentence encoder, or a hub id such as "
            "sentence-transformers/all-mpnet-base-v2. Pass one of them."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(folder_or_hub), allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise PlanMismatch(
            f"'{folder_or_hub}' is no folder, and no reachable repository of the hub ({type(error).__name__}); "
            "expected a sentence encoder. Pass its local folder, or leave encoder out to use the "
            "pipeline's text encoder."
        ) from None


def _modules(folder: Path) -> tuple[Path, str]:
    """The text model's folder, and its pooling."""
    text, pooled = folder, folder / "1_Pooling"
    listed = _json(folder / "modules.json", default=[])
    for module in listed:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind not in _KNOWN_MODULES:
            raise UnsupportedModel(
                f"'{folder}' has a module of type '{module.get('type')}'; expected {', '.join(_KNOWN_MODULES)}. Pass "
                "another sentence encoder, or an object of your own (genprune.routers.SentenceEncoder)."
            )
        if kind == "Transformer":
            text = folder / module.get("path", "")
        elif kind == "Pooling":
            pooled = folder / module.get("path", "")
    return text, _pooling(pooled / "config.json")


def _pooling(path: Path) -> str:
    config = _json(path)
    if not config:
        return "mean"
    if "pooling_mode" in config:
        modes = config["pooling_mode"]
        chosen = [modes] if isinstance(modes, str) else list(modes)
    else:
        chosen = [
            _OLD_NAMES.get(key, key.removeprefix("pooling_mode_"))
            for key, on in config.items()
            if key.startswith("pooling_mode_") and on is True
        ]
    if len(chosen) != 1 or chosen[0] not in POOLINGS:
        raise UnsupportedModel(
            f"'{path}' asks for the pooling {' + '.join(chosen) or 'none'}; expected one of {', '.join(POOLINGS)}. "
            "Pass another sentence encoder, or an object of your own (genprune.routers.SentenceEncoder)."
        )
    return chosen[0]


def _json(path: Path, default: Any = None) -> Any:
    if not path.is_file():
        return {} if default is None else default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlanMismatch(
            f"'{path}' is not whole JSON ({error}). Restore the file, or fetch the folder anew."
        ) from None


def _load(folder: Path) -> tuple[Any, nn.Module]:
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, info = AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise PlanMismatch(
            f"'{folder}' does not load as a text encoder ({type(error).__name__}: {error}); expected a tokenizer, a "
            "config.json and whole safetensors weights. Fetch the folder anew."
        ) from None
    # a pooler of BERT is not what a sentence encoder reads
    lacking = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if lacking or info["mismatched_keys"]:
        raise PlanMismatch(
            f"'{folder}' lacks {len(lacking)} weights of its {type(model).__name__} ('{(lacking or ['?'])[0]}'), "
            "which would stand at random values; expected all of them. Fetch the folder anew."
        )
    return tokenizer, model.eval().requires_grad_(False)
