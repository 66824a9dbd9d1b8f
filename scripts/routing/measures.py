"""Measures beside the grades: retrieval of captions by pictures, the control rows, the map of prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genprune import miniature
from genprune.miniature.grader import labels, load_grader, said
from genprune.routers.words import typical_words
from scripts.ecodiff.figures import Dense, Judge

MAP_SEED, MAP_PROMPTS, WORDS = 46, 512, 6


@torch.no_grad()
def retrieval(pictures: Tensor, scenes: list, ranks: tuple[int, ...] = (1, 5)) -> dict[str, float]:
    """How often a picture's own caption is among the best of all captions, by the grader's log-likelihood.

    The mean log-probability of the attributes that a caption names. Captions that say the same count as one.

    Args:
        pictures: uint8 `(n, 3, 64, 64)`, picture i drawn from scene i.
    """
    logits = load_grader()(pictures)
    truth = labels(scenes)
    named = said(truth)
    total = torch.zeros(len(pictures), len(scenes))
    for name, values in logits.items():
        chances = torch.log_softmax(values, -1)[:, truth[name]]  # (pictures, captions)
        total += torch.where(named[name], chances, 0.0)
    total /= torch.stack([named[name] for name in logits]).sum(0)
    own = total.diagonal()[:, None]
    better = (total > own).sum(1)
    return {f"R@{rank}": float((better < rank).double().mean()) for rank in ranks}


def control_rows(judge: Judge, dense: Dense) -> dict[str, Any]:
    """What pictures of no worth score: a blank canvas, the mean picture, right pictures of other captions."""
    mean = dense.pictures.double().mean(0).round().to(torch.uint8)
    rows = {
        "blank canvas": torch.full_like(dense.pictures, 255),
        "mean image": mean.expand_as(dense.pictures).contiguous(),
        "shuffled prompts": dense.pictures.roll(1, 0),
    }
    found = {}
    for name, pictures in rows.items():
        figures = judge.figures(pictures, dense.latents, dense)
        figures.pop("latent_error")  # of the pictures there are no latents
        found[name] = figures | retrieval(pictures, judge.scenes)
    return found


def prompt_map(router: Any) -> list[dict[str, Any]]:
    """For each expert: the words most typical of its prompts, and the kinds of scenes that go there."""
    scenes = miniature.scenes("test", MAP_PROMPTS, MAP_SEED)
    captions = [miniature.caption(scene) for scene in scenes]
    experts = router.route(captions, unfamiliar="nearest").experts
    words = typical_words(captions, experts, WORDS)
    found = []
    for expert in range(len(router.experts)):
        mine = [scene.kind for scene, place in zip(scenes, experts) if place == expert]
        found.append(
            {
                "share": router.experts[expert].share,
                "prompts": len(mine),
                "words": [word.text for word in words.get(expert, ())],
                "kinds": {kind: mine.count(kind) for kind in sorted(set(mine))},
            }
        )
    return found
