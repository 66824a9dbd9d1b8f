"""A tokenizer and a text model as one: from prompts to vectors, one by one, in float32 on the CPU."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genprune.methods.base import check_whole
from genprune.routers.fingerprints import vocabulary_fingerprint, weights_fingerprint
from genprune.routers.prompts import checked_prompts

logger = logging.getLogger(__name__)
_UNLIMITED = 1 << 30
_LONGEST = 512  # tokens, where neither tokenizer nor model has a limit
_REMEMBERED = 1000  # long prompts that were told


class TextModel:
    """A tokenizer and a text model, and what of the model's output is the vector.

    Args:
        tokenizer, model: of `transformers`; the model in evaluation mode.
        pooling: `mean` over the tokens, `cls` (the first one), or `pooler_output` or `text_embeds` of a CLIP model.
        dim: width of the vectors.
        max_length: tokens of a prompt that are read, special ones included.
        name: for messages.
    """

    kind = "text model"
    source = ""

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
            BadPrompt: no prompts, no text, or a blank one. GenpruneError: `batch_size` is no whole number >= 1.
        """
        check_whole("batch_size", batch_size, 1)
        prompts = checked_prompts(prompts)
        model = self._ready_model()
        rows = [self._tokens(prompt) for prompt in prompts]
        encoded = [self._pooled(model, rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
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
        # with a limit, because without one the tokenizer warns of an error that does not come
        whole = self.tokenizer(prompt, truncation=True, max_length=_UNLIMITED)["input_ids"]
        if (left_out := len(whole) - self.max_length) > 0:
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


def token_limit(tokenizer, model: nn.Module) -> int:
    """Tokens of a prompt that can be read."""
    positions = getattr(model.config, "max_position_embeddings", None) or _LONGEST
    return int(min(tokenizer.model_max_length or _LONGEST, positions))
