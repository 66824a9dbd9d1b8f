"""Sentence encoders: from prompts to vectors, frozen, in float32 on the CPU whatever the pipeline does."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from genprune.errors import PlanMismatch, UnsupportedModel
from genprune.routers.fingerprints import same_weights, vocabulary_fingerprint, weights_fingerprint
from genprune.routers.prompts import checked_prompts
from genprune.routers.sentence_folders import load_sentence_folder

logger = logging.getLogger(__name__)

DEFAULT = "sentence-transformers/all-mpnet-base-v2"
_LONGEST = 512  # tokens, where neither tokenizer nor model has a limit
_REMEMBERED = 1000  # long prompts that were told


@runtime_checkable
class SentenceEncoder(Protocol):
    """What a router needs of an encoder.

    Attributes:
        dim: width of the vectors.
        name: for messages.
    """

    dim: int
    name: str

    def encode(self, prompts: Sequence[str], batch_size: int = 1) -> Tensor:
        """Float32 `(prompts, dim)` on the CPU, not normalised; a row depends on its own prompt alone."""

    def unknown_share(self, prompt: str) -> float:
        """Share of the prompt's tokens that the tokenizer has no entry for, in [0, 1]."""

    def to_json(self) -> dict[str, Any]:
        """What tells this encoder from another, as JSON data."""


class _TextModel:
    """A tokenizer and a text model, and what of the model's output is the vector."""

    def __init__(self, tokenizer, model: nn.Module, pooling: str, dim: int, max_length: int, name: str) -> None:
        self.tokenizer, self.model, self.pooling = tokenizer, model, pooling
        self.dim, self.max_length, self.name = dim, max_length, name
        self._told: set[str] = set()
        self._identity: dict[str, Any] | None = None

    def encode(self, prompts: Sequence[str], batch_size: int = 1) -> Tensor:
        """Vectors of prompts.

        Args:
            prompts: texts, none of them blank. What is longer than `max_length` tokens is cut there, and told once.
            batch_size: prompts of one pass, >= 1. 1 pads nothing, so that a row is the same to the bit whatever stands
                beside it; more is quicker and differs in the last digits.

        Returns:
            Float32 of shape `(prompts, dim)` on the CPU, not normalised.

        Raises:
            BadPrompt: no prompts, no text, or a blank one.
        """
        prompts = checked_prompts(prompts)
        model = self._ready_model()
        rows = [self._tokens(prompt) for prompt in prompts]
        encoded = [
            self._pooled(model, rows[start : start + batch_size]) for start in range(0, len(rows), max(1, batch_size))
        ]
        return torch.cat(encoded)

    def unknown_share(self, prompt: str) -> float:
        """Share of the prompt's tokens without an entry in the vocabulary; 1 where the tokenizer finds no token."""
        tokens = self.tokenizer(prompt, add_special_tokens=False, truncation=True, max_length=self.max_length)
        ids, unknown = tokens["input_ids"], self.tokenizer.unk_token_id
        return sum(each == unknown for each in ids) / len(ids) if ids else 1.0

    def to_json(self) -> dict[str, Any]:
        """What tells this encoder from another: kind, pooling, sizes, fingerprints of weights and vocabulary."""
        if self._identity is None:
            self._identity = {
                "kind": self.kind,
                "source": self.source,
                "model": type(self.model).__name__,
                "pooling": self.pooling,
                "dim": self.dim,
                "max_length": self.max_length,
                "vocabulary_sha256": vocabulary_fingerprint(self.tokenizer),
                "weights": weights_fingerprint(self._ready_model()),
            }
        return dict(self._identity)

    def _ready_model(self) -> nn.Module:
        return self.model

    def _tokens(self, prompt: str) -> list[int]:
        ids = self.tokenizer(prompt, truncation=True, max_length=self.max_length)["input_ids"]
        if len(ids) == self.max_length:
            self._tell_left_out(prompt)
        return ids

    def _tell_left_out(self, prompt: str) -> None:
        seen = hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest()
        if seen in self._told:
            return
        self._told = {seen} if len(self._told) >= _REMEMBERED else self._told | {seen}
        special = self.tokenizer.num_special_tokens_to_add()
        if (left_out := len(self.tokenizer.tokenize(prompt)) + special - self.max_length) > 0:
            logger.warning(
                "a prompt of %d characters is routed by its first %d tokens; the last %d are left out. Prompt: %.60r",
                len(prompt),
                self.max_length - special,
                left_out,
                prompt,
            )

    @torch.no_grad()
    def _pooled(self, model: nn.Module, rows: list[list[int]]) -> Tensor:
        longest = max(map(len, rows))
        filler = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [filler] * (longest - len(row)) for row in rows], device="cpu")
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device="cpu")
        with torch.autocast("cpu", enabled=False):
            if self.pooling in ("pooler_output", "text_embeds"):
                # as pipelines call it: what stands after the end of the text is never attended to
                return model(input_ids=ids)[self.pooling].float()
            states = model(input_ids=ids, attention_mask=mask).last_hidden_state  # (rows, tokens, dim)
        if self.pooling == "cls":
            return states[:, 0].float()
        weights = mask[..., None].to(states.dtype)
        return ((states * weights).sum(1) / weights.sum(1)).float()


class TransformersEncoder(_TextModel):
    """A sentence encoder from a folder or the hub, as its own files say, without the library that wrote them.

    Args:
        folder_or_hub: a folder, or a hub id.
        max_length: tokens of a prompt that are read, special ones included; None: what the folder says.

    Raises:
        UnsupportedModel: another pooling than `mean` or `cls`, or further layers after it.
        PlanMismatch: no such folder or repository, no safetensors weights in it, or some of them missing.

    Reference:
        APTP (arXiv 2406.12042): all-mpnet-base-v2, mean over the attention mask, not normalised.
    """

    kind = "transformers"

    def __init__(self, folder_or_hub: str | Path = DEFAULT, max_length: int | None = None) -> None:
        found = load_sentence_folder(folder_or_hub)
        self.source = str(folder_or_hub)
        limit = max_length or found.max_length or _limit(found.tokenizer, found.model)
        name = Path(self.source).name if Path(self.source).is_dir() else self.source
        super().__init__(found.tokenizer, found.model, found.pooling, found.model.config.hidden_size, limit, name)


class PooledTextEncoder(_TextModel):
    """The pipeline's own first text encoder: nothing to fetch, and a prompt-only call works everywhere.

    A CLIP encoder gives its pooled output, another one the mean over its tokens. The encoder itself is used while it
    is in float32 on the CPU; where it is not, a copy that is.

    Args:
        pipe: a diffusers pipeline with a text encoder.

    Raises:
        UnsupportedModel: the pipeline has none.
    """

    kind = "pooled"

    def __init__(self, pipe) -> None:
        slot = _text_slot(pipe)
        model, tokenizer = getattr(pipe, slot), getattr(pipe, slot.replace("text_encoder", "tokenizer"))
        self.source = slot
        self._shared = model
        self._layout = _layout(model)
        pooling, dim = _pooling_of(model)
        super().__init__(
            tokenizer, _as_float32(model), pooling, dim, _limit(tokenizer, model), f"pooled {type(model).__name__}"
        )

    def _ready_model(self) -> nn.Module:
        """The float32 CPU model; a copy from here on where the pipeline moved, cast or changed the shared one."""
        if self.model is not self._shared or _layout(self._shared) == self._layout:
            return self.model
        if _layout(self._shared)[2] != self._layout[2]:
            raise PlanMismatch(
                f"the pipeline's {self.source} has {_layout(self._shared)[2]} tensors, and had {self._layout[2]} when "
                "the router took it; expected the same model, because another routes otherwise. Unload the adapter, "
                "or make PooledTextEncoder(pipe) of a pipeline of its own and pass it as encoder=."
            )
        if self._shared.dtype != torch.float32:
            logger.warning(
                "the pipeline's %s was cast to %s after the router took it: prompts between two experts may change "
                "sides. Pass encoder=PooledTextEncoder(pipe) of a pipeline in float32.",
                self.source,
                self._shared.dtype,
            )
        self.model = _as_float32(self._shared)
        return self.model

    def __deepcopy__(self, memo: dict) -> PooledTextEncoder:
        """The text model stays shared: it is frozen."""
        twin = copy.copy(self)
        twin._told = set(self._told)
        return twin


def encoder_of(spec: SentenceEncoder | str | Path | None, pipe=None) -> SentenceEncoder:
    """An encoder from what a user names it by.

    Args:
        spec: an encoder, itself; a folder or hub id; None: the pipeline's own text encoder.
        pipe: for None.

    Raises:
        UnsupportedModel: None without a pipeline, or no encoder.
    """
    if spec is None:
        if pipe is None:
            raise UnsupportedModel(
                "neither an encoder nor a pipeline is given; expected one of them to read prompts with. Pass pipe=, "
                "whose text encoder is used, or encoder= with a folder or hub id of a sentence encoder."
            )
        return PooledTextEncoder(pipe)
    if isinstance(spec, (str, Path)):
        return TransformersEncoder(spec)
    if not isinstance(spec, SentenceEncoder):
        raise UnsupportedModel(
            f"encoder is a {type(spec).__name__}; expected an object with dim, name, encode, unknown_share and "
            "to_json, or a folder or hub id. See genprune.routers.SentenceEncoder."
        )
    return spec


def check_encoder(recorded: Mapping[str, Any], encoder: SentenceEncoder) -> None:
    """Refuse an encoder that gives other vectors than the one that a router was trained with.

    Args:
        recorded: what `to_json` of the trained one gave. Where it came from does not count.

    Raises:
        PlanMismatch: it is another.
    """
    found = encoder.to_json()
    for key, value in recorded.items():
        same = found.get(key) == value
        if key == "weights" and isinstance(value, str) and isinstance(found.get(key), str):
            same = same_weights(value, found[key])
        if key != "source" and not same:
            raise PlanMismatch(
                f"the encoder '{encoder.name}' has {key} {found.get(key)!r}, the router was trained with {value!r} "
                f"(from '{recorded.get('source')}'); expected the same encoder, because another one sends prompts to "
                "other experts. Pass that one as encoder=, or train a router with this one."
            )
    if recorded.get("weights") != found.get("weights"):
        logger.warning(
            "the encoder '%s' holds the weights that the router was trained with at another precision: prompts "
            "between two experts may change sides. Load the text encoder in the precision of the training.",
            encoder.name,
        )


def recorded_encoder(recorded: Mapping[str, Any], pipe=None) -> SentenceEncoder:
    """The encoder that a router's file names.

    Raises:
        PlanMismatch: it cannot be had without `pipe` or `encoder=`, or what is there now is another.
    """
    kind, source = recorded.get("kind"), recorded.get("source")
    if kind == TransformersEncoder.kind:
        try:
            encoder = TransformersEncoder(source, recorded.get("max_length"))
        except PlanMismatch as error:
            raise PlanMismatch(
                f"the router reads prompts with '{source}', which cannot be loaded from there ({error}). Pass "
                "from_pretrained(..., encoder=) with the folder of the same encoder."
            ) from None
    elif kind == PooledTextEncoder.kind and pipe is not None:
        encoder = PooledTextEncoder(pipe)
    else:
        what = f"the {source} of its pipeline" if kind == PooledTextEncoder.kind else f"an encoder of kind {kind!r}"
        raise PlanMismatch(
            f"the router reads prompts with {what}, which its folder does not hold; expected the pipeline or the "
            "encoder. Pass from_pretrained(..., pipe=pipe), or encoder= with the encoder itself."
        )
    check_encoder(recorded, encoder)
    return encoder


# ---- the parts of a pipeline ----------------------------------------------------------------------------------------


def _text_slot(pipe) -> str:
    """The attribute of the first CLIP text encoder, or of the first one."""
    names = [name for name in ("text_encoder", "text_encoder_2", "text_encoder_3") if getattr(pipe, name, None)]
    clip = [name for name in names if "CLIP" in type(getattr(pipe, name)).__name__]
    if not names:
        raise UnsupportedModel(
            f"{type(pipe).__name__} has no text encoder to read prompts with; expected a text-to-image pipeline, "
            "loaded with its text encoders. Pass encoder= with a folder or hub id of a sentence encoder."
        )
    return (clip or names)[0]


def _pooling_of(model: nn.Module) -> tuple[str, int]:
    if "CLIP" not in type(model).__name__:
        return "mean", model.config.hidden_size
    if type(model).__name__.endswith("WithProjection"):
        return "text_embeds", model.config.projection_dim
    return "pooler_output", model.config.hidden_size


def _limit(tokenizer, model: nn.Module) -> int:
    """Tokens of a prompt that can be read."""
    positions = getattr(model.config, "max_position_embeddings", None) or _LONGEST
    return int(min(tokenizer.model_max_length or _LONGEST, positions))


def _layout(model: nn.Module) -> tuple[torch.device, torch.dtype, int, bool]:
    """Device, precision, number of tensors, and whether it is offloaded when it is called."""
    return model.device, model.dtype, sum(1 for _ in model.parameters()), hasattr(model, "_hf_hook")


def _as_float32(model: nn.Module) -> nn.Module:
    """The model itself where it is in float32 on the CPU, else a frozen copy that is."""
    own = {(tensor.device.type, tensor.dtype) for tensor in model.parameters()}
    if own == {("cpu", torch.float32)} and not model.training and not hasattr(model, "_hf_hook"):
        return model
    if any(tensor.is_meta for tensor in model.parameters()):
        raise UnsupportedModel(
            f"the weights of {type(model).__name__} are not in memory (offloaded); expected them there. Make the "
            "router's encoder before the pipeline is offloaded, or pass encoder=."
        )
    twin = copy.deepcopy(model)
    if hasattr(model, "_hf_hook"):  # of `enable_model_cpu_offload`: it would run the copy on the accelerator
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(twin, recurse=True)
    return twin.to("cpu", torch.float32).eval().requires_grad_(False)
