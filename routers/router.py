"""`PromptRouter`: which expert a prompt goes to. Noise-free, on the CPU, one prompt at a time."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genprune.errors import GenpruneError, PlanMismatch, nearest
from genprune.plan import PlanBase
from genprune.routers.architecture import ArchitectureSpace
from genprune.routers.balance import keep_budget, mean_share
from genprune.routers.encoders import SentenceEncoder
from genprune.routers.expert_set import ExpertSet
from genprune.routers.experts import Expert, Routes
from genprune.routers.familiarity import Familiarity
from genprune.routers.prompts import BadPrompt, checked_prompts

logger = logging.getLogger(__name__)
POLICIES = ("largest", "nearest", "error")


class PromptRouter(ExpertSet):
    """Sends each prompt to one of K experts of a denoiser.

    A route is the argmax over k of S_ik + b_k, with S_ik = cos(phi(e_i), phi(a_k)), e the architecture that the
    predictor reads off the prompt's embedding, a_k the codes and b_k constants; of equal ones the first. Nothing is
    drawn at random, and each prompt is encoded and compared alone in float32 (cosines in float64) on the CPU, so that
    its expert depends neither on its batch nor on where the pipeline runs.

    Args:
        encoder: frozen sentence encoder.
        space: layout of the codes.
        predictor: embeddings `(n, dim)` -> logits `(n, D)`.
        codes: logits, shape `(K, D)`.
        experts: K of them, in the order of the codes.
        base, training, weights_fingerprint, made_by: see `ExpertSet`.
        familiarity: what the training prompts were like; None: only words that the encoder does not know are told.
        bias: b_k, shape `(K,)`: what gives every code its share of the training prompts, as in training; None: 0, as
            published.
        shift: what was added to the codes' logits for the plans to keep the budget; routes do not use it.

    Raises:
        PlanMismatch: shapes do not fit each other, or a plan is for another model.
        GenpruneError: codes that are not finite.

    Reference:
        APTP (Ganjdanesh et al., arXiv 2406.12042), section 3. Its release adds noise by the position in the batch.
    """

    kind = "prompt"

    def __init__(
        self,
        encoder: SentenceEncoder,
        space: ArchitectureSpace,
        predictor: nn.Module,
        codes: Tensor,
        experts: Sequence[Expert],
        *,
        base: PlanBase,
        training: Mapping[str, Any] | None = None,
        familiarity: Familiarity | None = None,
        weights_fingerprint: str | None = None,
        shift: float = 0.0,
        bias: Tensor | None = None,
        made_by: Mapping[str, Any] | None = None,
    ) -> None:
        experts = tuple(experts)
        codes = codes.detach().to("cpu", torch.float32).clone()
        if codes.shape != (len(experts), space.length):
            raise PlanMismatch(
                f"the codes have shape {tuple(codes.shape)}; expected ({len(experts)}, {space.length}): one of the "
                "space's length for each expert. Pass the codes and experts of one training."
            )
        bias = torch.zeros(len(experts)) if bias is None else bias.detach()
        if bias.shape != (len(experts),):
            raise PlanMismatch(
                f"the bias has shape {tuple(bias.shape)}; expected ({len(experts)},): one number for each expert. "
                "Pass the codes, bias and experts of one training."
            )
        if not (codes.isfinite().all() and bias.isfinite().all()):
            raise GenpruneError(
                "the codes hold values that are not finite; expected logits. Train again at a lower learning rate."
            )
        if predictor.linear.in_features != encoder.dim:
            raise PlanMismatch(
                f"the encoder '{encoder.name}' gives vectors of {encoder.dim}, the predictor reads "
                f"{predictor.linear.in_features}; expected the encoder of the training. Pass that one as encoder=."
            )
        super().__init__(
            experts, base=base, training=training, weights_fingerprint=weights_fingerprint, made_by=made_by
        )
        self.encoder, self.space, self.codes = encoder, space, codes
        self.predictor = predictor.to("cpu", torch.float32).eval().requires_grad_(False)
        self.familiarity, self.shift = familiarity, float(shift)
        self.bias = bias.to("cpu", torch.float64).clone()
        self._features = torch.stack([space.features(code) for code in codes])  # (K, D)

    @torch.no_grad()
    def route(self, prompts: str | Sequence[str], *, unfamiliar: str = "largest", capacity: bool = False) -> Routes:
        """The expert of each prompt.

        Args:
            prompts: texts, none of them blank.
            unfamiliar: what becomes of a prompt that is unlike the training prompts, where routes mean little:
                `largest`: it goes to the largest expert; `nearest`: where it is nearest, as all others; both warn;
                `error`.
            capacity: bring the mean MACs of these prompts down to `target`, where they pass it, by sending those
                prompts to cheaper experts that lose the least similarity a MAC. The one option that lets a route
                depend on the batch. Prompts that went to the largest expert as unfamiliar stay there.

        Raises:
            BadPrompt: no prompts, no text, a blank one, or an unfamiliar one under `error`.
            GenpruneError: an unknown policy, or the encoder gives values that are not finite.
        """
        if unfamiliar not in POLICIES:
            raise GenpruneError(
                f"unfamiliar={unfamiliar!r}{nearest(str(unfamiliar), POLICIES)}; expected one of "
                f"{', '.join(POLICIES)}."
            )
        prompts = checked_prompts(prompts)
        known = {prompt: self._compare(prompt) for prompt in dict.fromkeys(prompts)}
        similarities = torch.stack([known[prompt][0] for prompt in prompts])
        reasons = tuple(known[prompt][1] for prompt in prompts)
        wanted = similarities + self.bias
        experts = [row.tolist().index(float(row.max())) for row in wanted]
        self._tell_unfamiliar(prompts, reasons, unfamiliar)
        fixed = [reason is not None and unfamiliar == "largest" for reason in reasons]
        if any(fixed):
            largest = self.largest
            experts = [largest if stays else expert for stays, expert in zip(fixed, experts)]
        if capacity:
            experts = self._within_budget(wanted, experts, fixed)
        return Routes(tuple(experts), similarities, reasons)

    def _compare(self, prompt: str) -> tuple[Tensor, str | None]:
        """Similarities to the codes, float64 of shape `(K,)`, and why the prompt is unfamiliar."""
        embedding = self.encoder.encode([prompt], batch_size=1)[0].to("cpu", torch.float32)
        with torch.autocast("cpu", enabled=False):
            features = self.space.features(self.predictor(embedding[None])[0])
        # row by row, so that equal codes are level to the bit
        similarity = (self._features * features).sum(-1)
        if not similarity.isfinite().all():
            raise GenpruneError(
                f"the encoder '{self.encoder.name}' gives values that are not finite for the prompt {prompt[:60]!r}; "
                "expected a vector. Check the encoder's weights, or choose the expert yourself with expert=."
            )
        unknown = self.encoder.unknown_share(prompt)
        return similarity, (self.familiarity or Familiarity.nothing()).reason(embedding, unknown)

    def _tell_unfamiliar(self, prompts: Sequence[str], reasons: Sequence[str | None], policy: str) -> None:
        strange = [index for index, reason in enumerate(reasons) if reason is not None]
        if not strange:
            return
        first = strange[0]
        told = (
            f"{len(strange)} of {len(prompts)} prompts are unlike those that the router was trained on (prompt "
            f"{first}, {prompts[first][:60]!r}: {reasons[first]})"
        )
        if policy == "error":
            raise BadPrompt(
                f"{told}; expected familiar ones with unfamiliar='error'. Pass unfamiliar='largest' or 'nearest', or "
                "choose the expert yourself with expert= where the pipeline is called."
            )
        goes = f"they go to the largest expert, {self.largest}" if policy == "largest" else "they are routed as all"
        logger.warning("%s; %s", told, goes)

    def _within_budget(self, similarities: Tensor, experts: Sequence[int], fixed: Sequence[bool]) -> Sequence[int]:
        chosen = keep_budget(similarities, experts, self.shares, self.target, fixed)
        reached = mean_share([chosen.count(expert) for expert in range(len(self.experts))], self.shares)
        if reached > self.target + 1e-12:
            logger.warning(
                "these prompts cost %.1f %% of the dense MACs on average and cannot be brought to the budget of %.1f "
                "%%: the cheapest experts are in use already, or prompts are unfamiliar",
                100 * reached,
                100 * self.target,
            )
        return chosen

    def __call__(self, prompts: str | Sequence[str]) -> tuple[int, ...]:
        """The experts of prompts: `route(prompts).experts`."""
        return self.route(prompts).experts

    def save_pretrained(self, folder: str | os.PathLike) -> Path:
        """Write `router_config.json`, `router.safetensors` and `experts/00` ... Nothing is left half-written.

        The encoder is not in the folder: what tells it from another is, and where it came from.

        Raises:
            PlanMismatch: `folder` is a file, or holds something else than a router.
        """
        from genprune.routers.router_format import save_router

        return save_router(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, encoder: Any = None, pipe: Any = None) -> PromptRouter:
        """Read a router.

        Args:
            folder: what `save_pretrained` wrote.
            encoder: the encoder of the training, a folder or hub id of it; None: what the router's file names.
            pipe: the pipeline whose text encoder the router reads with, where it does.

        Raises:
            PlanMismatch: a part is missing, damaged or of another router, the encoder is another or not to be had, or
                a newer genprune wrote it.
        """
        from genprune.routers.router_format import load_router

        return load_router(folder, encoder=encoder, pipe=pipe, kind=cls.kind)
