"""Recovery of one cut pipeline along its curve: the same data, order and noise for every candidate."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import genprune as gp
from genprune import miniature
from scripts.ecodiff.bases import Base

DATA_SEED = 31  # of the train scenes that recovery reads; the bases were trained on seed 0
BATCH = 32
SEEN = {"unet": 187_200, "mmdit": 230_400}  # pictures that each base was trained on
SHARES = (0.001, 0.01, 0.05)


def milestones(base: Base, most: float) -> dict[int, float]:
    """Optimiser step -> share of the base's samples, up to a share."""
    return {max(1, round(share * SEEN[base.name] / BATCH)): share for share in SHARES if share <= most}


def recovery_data(base: Base, count: int) -> tuple[torch.Tensor, list[str]]:
    """Train scenes: pictures `(count, 3, 64, 64)` in [0, 1], and captions."""
    scenes = miniature.scenes("train", count, DATA_SEED)
    pictures = torch.stack([torch.from_numpy(miniature.render(scene)).permute(2, 0, 1) for scene in scenes])
    return pictures.float() / 255, [miniature.caption(scene) for scene in scenes]


class Recoverer:
    """Recovers candidates of one base on one set of latents and conditions, encoded once and kept in `work`.

    Args:
        count: samples of the data; a longer run goes over them again in another order.
    """

    def __init__(self, base: Base, teacher, work: Path, count: int, threads: int):
        self.base, self.teacher, self.work, self.threads = base, teacher, work, threads
        self.pictures, self.captions = recovery_data(base, count)

    def run(
        self, pipe, slug: str, most: float, judge: Callable[[Any], dict], **changes: Any
    ) -> tuple[dict[float, dict], list[dict]]:
        """Share of samples -> figures, and the run's curve.

        Args:
            pipe: cut; trained in place.
            slug: folder of its checkpoints.
            most: largest share.
            judge: figures of a pipeline.
            changes: fields of `NormalizedDistillation`.
        """
        stops = milestones(self.base, most)
        folder = self.work / "recovery" / slug
        done = folder / "figures.json"
        if done.is_file():
            kept = json.loads(done.read_text())
            return {float(share): row for share, row in kept["points"].items()}, kept["curve"]
        options = dict(self.base.options)
        method = gp.NormalizedDistillation(
            steps=max(stops),
            batch_size=BATCH,
            learning_rate=3e-4,
            warmup_steps=min(20, max(stops) // 2),
            weight_decay=0.0,
            prompt_dropout=0.1,
            ema_decay=0.99,
            feature_reduction="mean",
            mixed_precision="bf16",
            teacher_guidance=options.pop("guidance_scale", None),
        )
        method = method.changed(**changes)
        points: dict[float, dict] = {}

        def validation(step: int, target: Any) -> dict:
            if step in stops:
                points[stops[step]] = judge(target)
            return {}

        folder.mkdir(parents=True, exist_ok=True)
        shared = self.work / "recovery" / "data" / "teacher_data"
        if shared.is_dir() and not (folder / "teacher_data").exists():
            os.symlink(shared.resolve(), folder / "teacher_data")
        result = gp.recover(
            pipe,
            self.teacher,
            method,
            prompts=self.captions,
            data=self.pictures,
            output_dir=folder,
            resume=any(folder.glob("checkpoint-*")),
            checkpointing_steps=10**6,
            validation=validation,
            validation_steps=1,
            pipeline_options=options,
            progress=False,
        )
        if not shared.is_dir():
            shared.parent.mkdir(parents=True, exist_ok=True)
            os.rename(folder / "teacher_data", shared)
        curve = [{key: value for key, value in row.items() if key != "validation"} for row in result.curve]
        done.write_text(json.dumps({"points": points, "curve": curve}))
        for checkpoint in folder.glob("checkpoint-*"):
            for file in checkpoint.iterdir():
                file.unlink()
            checkpoint.rmdir()
        return points, curve
