"""Fingerprints: whether weights, a vocabulary or a file are those that a router was made with."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from torch import nn

_SAMPLES = 64  # values of a tensor
_PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)
_WHOLE, _CHUNK, _CHUNKS = 1 << 26, 1 << 20, 64  # bytes, bytes, number


def weights_fingerprint(module: nn.Module) -> str | None:
    """Digests of names, shapes and evenly spread values of a model's weights, at three precisions.

    A model that was cast keeps the digest of the precision that it was cast to, so that `same_weights` knows it again.

    Returns:
        `float32:... float16:... bfloat16:...`; None for a model whose weights are not in memory.
    """
    digests = {dtype: hashlib.sha256() for dtype in _PRECISIONS}
    for name, tensor in sorted(module.state_dict().items()):
        if tensor.is_meta:
            return None
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // _SAMPLES)].float().cpu()
        for dtype, digest in digests.items():
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(sample.to(dtype).double().numpy().tobytes())
    return " ".join(f"{str(dtype).split('.')[-1]}:{digest.hexdigest()[:32]}" for dtype, digest in digests.items())


def same_weights(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same weights, perhaps at another precision."""
    return bool(set(one.split()) & set(other.split()))


def vocabulary_fingerprint(tokenizer) -> str:
    """sha256 over the entries of a tokenizer and their numbers."""
    entries = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def file_fingerprint(path: str | os.PathLike) -> str:
    """sha256 over a file's size and bytes; of more than 64 MiB, over 64 evenly spread MiB, so that it stays quick."""
    path = Path(path)
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}\n".encode())
    with path.open("rb") as file:
        if size <= _WHOLE:
            digest.update(file.read())
        else:
            for part in range(_CHUNKS):
                file.seek(part * (size - _CHUNK) // (_CHUNKS - 1))
                digest.update(file.read(_CHUNK))
    return digest.hexdigest()
