"""Routers of one base: trained once, fine-tuned once, kept on disk."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import genprune as gp
from genprune.costs import site_costs
from genprune.families import OperatingPoint, denoiser
from genprune.routers.experts import Expert
from genprune.routers.finetuning import finetune_experts
from genprune.routers.fingerprints import weights_fingerprint
from genprune.routers.router_format import load_router
from genprune.routers.settings import APTP
from genprune.routers.timestep_router import TimestepRouter
from genprune.routers.training import train_router
from scripts.ecodiff.bases import Base, operating_point
from scripts.ecodiff.plans import Planner as UnitPlanner
from scripts.layers.plans import Planner as LayerPlanner
from scripts.layers.recovering import BATCH, SEEN, recovery_data

from .candidates import FINETUNE, Candidate

SHUFFLE_SEED = 17


class Routers:
    """Makes what candidates are: routers, whose experts are plain cuts or fine-tuned.

    Args:
        work: folder of this comparison. ecodiff, layers: work folders of those comparisons, whose scores and plans are
            used where they are there, and made where they are not.
        encoder: folder of a sentence encoder.
        samples: train scenes that routers and experts are trained on.
        steps: of a router's training.
    """

    def __init__(
        self, base: Base, pipe, work: Path, ecodiff: Path, layers: Path, encoder: str, samples: int, steps: int
    ) -> None:
        self.base, self.pipe, self.work, self.encoder, self.steps = base, pipe, work / base.name, encoder, steps
        self.units = UnitPlanner(base, pipe, ecodiff, 150, 256)
        self.layers = LayerPlanner(base, pipe, layers / base.name, 64, 16, 100)
        self.pictures, self.captions = recovery_data(base, samples)
        self.options = {name: value for name, value in base.options.items() if name != "guidance_scale"}
        self.options["num_inference_steps"] = base.steps

    def settings(self, candidate: Candidate, keep: float) -> APTP:
        """Chosen on dev captions of the U-Net, before a test caption was drawn; the same for both bases."""
        return APTP(
            experts=candidate.experts,
            keep=keep,
            route_by=candidate.route_by,
            steps=self.steps,
            batch_size=32,
            learning_rate=0.02,
            lr_warmup_steps=5,
            mixed_precision="bf16",
        ).changed(**dict(candidate.changes))

    def trained(self, candidate: Candidate, keep: float) -> Any:
        """The router of a candidate with plain cuts; a static plan is a router of one interval of noise levels."""
        if candidate.source != "router":
            return self._static(candidate.source, keep)
        folder = self.work / "routers" / f"{candidate.router_slug}@{keep:g}"
        if not (folder / "router").is_dir():
            train_router(
                self.pipe,
                self.settings(candidate, keep),
                prompts=self.captions,
                data=self.pictures,
                scores=self.units.scores("ecodiff"),
                encoder=self.encoder,
                operating_point=OperatingPoint(**self.base.point),
                pipeline_options=self.options,
                output_dir=folder,
                resume=any(folder.glob("checkpoint-*")),
                checkpointing_steps=50,
                progress=False,
            )
        return load_router(folder / "router", encoder=self.encoder, pipe=self.pipe)

    def curve(self, candidate: Candidate, keep: float) -> list[dict]:
        """The training's curve, thinned; empty for a static plan."""
        file = self.work / "routers" / f"{candidate.router_slug}@{keep:g}" / "curve.json"
        curve = json.loads(file.read_text()) if candidate.source == "router" else []
        return [record for index, record in enumerate(curve) if index % 10 == 0 or index == len(curve) - 1]

    def _static(self, source: str, keep: float) -> TimestepRouter:
        model = denoiser(self.pipe)
        if source == "ecodiff":
            plan = self.units.plan("ecodiff", keep, "macs")
        else:
            plan = self.layers.plan("laptop", keep)
        return TimestepRouter(
            [Expert(plan, 1.0)], (), base=gp.plan_base(model), weights_fingerprint=weights_fingerprint(model)
        )

    def routes(self, candidate: Candidate, router: Any, prompts: list[str]) -> list[int] | None:
        """The expert of each prompt; None where noise levels choose."""
        if router.kind == "timestep":
            return None
        experts = list(router.route(prompts, unfamiliar="nearest").experts)
        if candidate.random:
            random.Random(SHUFFLE_SEED).shuffle(experts)
        return experts

    def finetuned(self, candidate: Candidate, keep: float, router: Any) -> Any:
        """The router with experts trained for the same number of samples in all, whatever their number."""
        folder = self.work / "experts" / f"{candidate.slug}@{keep:g}"
        folder.mkdir(parents=True, exist_ok=True)
        shared = self.work / "teacher_data"
        if shared.is_dir() and not (folder / "teacher_data").exists():
            (folder / "teacher_data").symlink_to(shared.resolve())
        method = gp.NormalizedDistillation(
            steps=max(1, round(FINETUNE[self.base.name][keep] * SEEN[self.base.name] / BATCH)),
            batch_size=BATCH,
            learning_rate=3e-4,
            warmup_steps=5,
            weight_decay=0.0,
            prompt_dropout=0.1,
            ema_decay=0.99,
            feature_reduction="mean",
            mixed_precision="bf16",
            teacher_guidance=self.base.options.get("guidance_scale"),
        )
        tuned = finetune_experts(
            self.pipe,
            router,
            method,
            prompts=self.captions,
            data=self.pictures,
            assignment=self.routes(candidate, router, self.captions) if candidate.random else None,
            output_dir=folder,
            resume=True,
            checkpointing_steps=10**6,
            pipeline_options={k: v for k, v in self.options.items() if k != "num_inference_steps"},
            progress=False,
        )
        if not shared.is_dir():
            (folder / "teacher_data").rename(shared)
        for checkpoint in folder.glob("expert-*/checkpoint-*"):
            for file in checkpoint.iterdir():
                file.unlink()
            checkpoint.rmdir()
        return tuned

    def point(self) -> OperatingPoint:
        return operating_point(self.pipe, self.base)

    def macs(self) -> int:
        """Of the dense model, at the point that budgets are counted at."""
        return site_costs(denoiser(self.pipe), self.point()).total.macs
