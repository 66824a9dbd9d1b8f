"""Stage "grader": the network that reads scenes back from pictures (its class lives in the package)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from genprune.miniature import grammar
from genprune.miniature.grader import Grader, grade, labels


def weather(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Blur and noise pictures at random: generated pictures are softer than drawn ones, and must be read as well.

    Args:
        pictures: float `(B, 3, H, W)` in [0, 1].
    """
    kind = rng.integers(3)
    if kind == 1:
        pictures = functional.avg_pool2d(functional.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    elif kind == 2:
        half = functional.avg_pool2d(pictures, 2)
        pictures = functional.interpolate(half, scale_factor=2, mode="bilinear", align_corners=False)
    noise = torch.randn_like(pictures) * float(rng.uniform(0, 0.06))
    shade = 1 + torch.empty(len(pictures), 3, 1, 1).uniform_(-0.06, 0.06)
    return (pictures * shade + noise).clamp(0, 1)


class GraderStage:
    """Cross-entropy of every attribute on train scenes; `preview` writes accuracies on dev scenes."""

    def __init__(self, grader: Grader, seed: int = 0, batch_size: int = 64) -> None:
        self.modules = nn.ModuleDict({"grader": grader}).to(memory_format=torch.channels_last)
        self.grader, self.seed, self.batch_size = grader, seed, batch_size

    def loss(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng((self.seed, 23, step, rank))
        scenes = [grammar.sample_scene(rng) for _ in range(self.batch_size // world)]
        pictures = weather(stack(scenes).float() / 255, rng)
        device = next(self.grader.parameters()).device
        logits, truth = self.grader(pictures.to(device)), labels(scenes)
        loss = sum(functional.cross_entropy(logits[name].float(), truth[name].to(device)) for name in truth)
        return loss, {}

    @torch.no_grad()
    def preview(self, folder: Path, step: int) -> None:
        scenes = grammar.scenes("dev", 1000, seed=self.seed)
        figures = grade(stack(scenes), scenes, self.grader)
        text = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        with (folder / "preview.txt").open("a") as file:
            file.write(f"step {step}: {text}\n")


def stack(scenes: list[grammar.Scene]) -> Tensor:
    """Pictures of scenes, uint8 `(N, 3, 64, 64)`."""
    return torch.from_numpy(np.stack([grammar.render(scene) for scene in scenes])).permute(0, 3, 1, 2).contiguous()
