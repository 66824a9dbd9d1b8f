"""Whether hard prompts get large experts: budgets of prompts against what the dense model finds hard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor

import genprune as gp
from genprune import miniature
from genprune.families import denoiser
from genprune.recovery.pipeline_data import pipeline_data
from genprune.untouched import untouched
from scripts.ecodiff.bases import Base

SEED, PROMPTS, EPOCHS, BINS, ROWS = 45, 256, 12, 10, 32


def scenes() -> list:
    """Test scenes of their own."""
    return miniature.scenes("test", PROMPTS, SEED)


def denoising_difficulty(base: Base, pipe: Any, file: Path) -> Tensor:
    """How badly the dense model denoises the picture of each prompt, shape `(prompts,)`; 1 is its mean.

    The error at drawn noise levels, each divided by the mean error of its level (one of ten intervals): otherwise the
    level alone would decide.
    """
    if file.is_file():
        return load_file(file)["difficulty"]
    drawn = scenes()
    pictures = torch.stack([torch.from_numpy(miniature.render(scene)).permute(2, 0, 1) for scene in drawn]).float()
    captions = [miniature.caption(scene) for scene in drawn]
    options = {name: value for name, value in base.options.items() if name != "guidance_scale"}
    settings = gp.NormalizedDistillation(
        batch_size=ROWS, seed=SEED, teacher_guidance=base.options.get("guidance_scale")
    )
    data = pipeline_data(pipe, pipe, settings, captions, pictures / 255, options)
    model, errors, levels, items = denoiser(pipe), [], [], []
    with untouched(model), torch.no_grad():
        for start in range(0, PROMPTS * EPOCHS, ROWS):
            indices = range(start, start + ROWS)
            rows = data.rows(indices)
            wrong = (rows.predict(model).float() - rows.target).square().flatten(1).mean(1)
            errors.append(wrong)
            levels += data.noise_levels(indices)
            items += [data.order.item(index) for index in indices]
    errors, place = torch.cat(errors), (torch.tensor(levels) * BINS).long().clamp_max(BINS - 1)
    means = torch.stack([errors[place == level].mean() for level in range(BINS)])
    total = torch.zeros(PROMPTS).index_add_(0, torch.tensor(items), errors / means[place])
    difficulty = total / EPOCHS
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"difficulty": difficulty}, file)
    return difficulty


def correlation(budgets: list[float], difficulty: Tensor, resamples: int = 2000) -> dict[str, float] | None:
    """Spearman's rank correlation with its 95 % bootstrap interval; None where all budgets are the same."""
    one, other = np.asarray(budgets), difficulty.double().numpy()
    if len(set(budgets)) < 2:
        return None
    generator = np.random.default_rng(0)
    draws = [generator.integers(0, len(one), len(one)) for _ in range(resamples)]
    values = [spearmanr(one[draw], other[draw]).statistic for draw in draws if len(set(one[draw])) > 1]
    low, high = np.quantile(values, [0.025, 0.975])
    return {"estimate": float(spearmanr(one, other).statistic), "low": float(low), "high": float(high)}


def difficulty_of(base: Base, pipe: Any, router: Any, file: Path) -> dict[str, Any]:
    """Rank correlations of the budgets that a router gives to prompts, with two views of how hard they are."""
    drawn = scenes()
    captions = [miniature.caption(scene) for scene in drawn]
    experts = router.route(captions, unfamiliar="nearest").experts
    budgets = [router.experts[expert].share for expert in experts]
    hard = denoising_difficulty(base, pipe, file)
    objects = torch.tensor([float(scene.count) for scene in drawn])
    return {
        "prompts": len(captions),
        "denoising_error": correlation(budgets, hard),
        "number_of_objects": correlation(budgets, objects),
        "mean_difficulty_by_expert": [
            float(hard[[e == k for e in experts]].mean()) if k in experts else None for k in range(len(router.experts))
        ],
    }
