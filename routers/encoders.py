"""Sentence encoders: from prompts to vectors, frozen, in float32 on the CPU whatever the pipeline does."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from genprune.errors import PlanMismatch, UnsupportedModel
from genprune.routers.fingerprints import same_weights
from genprune.routers.sentence_folders import load_sentence_folder
from genprune.routers.text_models import TextModel, token_limit

logger = logging.getLogger(__name__)

DEFAULT = "sentence-transformers/all-mpnet-base-v2"


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


class TransformersEncoder(TextModel):
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
        limit = max_length or found.max_length or token_limit(found.tokenizer, found.model)
        name = Path(self.source).name if Path(self.source).is_dir() else self.source
        super().__init__(found.tokenizer, found.model, found.pooling, found.model.config.hidden_size, limit, name)


class PooledTextEncoder(TextModel):
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
            tokenizer,
            _as_float32(model),
            pooling,
            dim,
            token_limit(tokenizer, model),
            f"pooled {type(model).__name__}",
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
