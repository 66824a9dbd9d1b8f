"""Plans of every method on one base, made once and kept on disk."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from pathlib import Path
from typing import Any

import genprune as gp
from genprune import miniature
from genprune.layers.scores import LayerScores
from scripts.ecodiff.bases import Base

BUDGETS = (0.75, 0.5)
METHODS = ("laptop", "ldpruner", "operators", "finercut", "tinyfusion", "alternate layers", "random")
PUBLISHED = "ldpruner"  # removals alone, by latent statistics


class Planner:
    """Plans of one base; scores are made when the first plan of a method is asked for.

    Args:
        work: folder of the plans and of the seconds that scoring took.
        captions: dev captions that layers are judged on.
        trajectories: of LD-Pruner. train_steps: of TinyFusion.
    """

    def __init__(self, base: Base, pipe, work: Path, captions: int, trajectories: int, train_steps: int):
        self.base, self.pipe, self.work = base, pipe, work
        self.prompts = miniature.prompts("dev", captions)
        self.trajectories, self.train_steps = trajectories, train_steps
        self.scores: dict[str, Any] = {}

    def plan(self, method: str, keep: float, seed: int = 0) -> gp.PruningPlan:
        """The plan of a method at a share of MACs."""
        folder = self.work / "plans" / f"{method.replace(' ', '-')}-{seed}@{keep:g}"
        if not folder.is_dir():
            began = time.perf_counter()
            plan = self._made(method, keep, seed)
            plan = dataclasses.replace(plan, made_by={**plan.made_by, "seconds": time.perf_counter() - began})
            folder.parent.mkdir(parents=True, exist_ok=True)
            plan.save(folder)
        return gp.PruningPlan.load(folder)

    def _made(self, method: str, keep: float, seed: int) -> gp.PruningPlan:
        if method == "tinyfusion":
            return self._tiny_fusion(keep, seed)
        if method in ("random", "alternate layers"):
            return self._unscored(method, keep, seed)
        if method == "finercut":  # its walk stops at the budget that it is given
            if method not in self.scores:
                self.scores[method] = self._score(gp.FinerCut(keep=min(BUDGETS), of="macs", samples=8, timesteps=2))
            return self.scores[method].plan(keep=keep)
        made = {
            "laptop": lambda: gp.LaptopDiff(of="macs"),
            "ldpruner": lambda: gp.LDPruner(
                of="macs", menu=("remove",), trajectories=self.trajectories, trajectory_steps=self._steps(8)
            ),
            "operators": lambda: gp.LDPruner(of="macs", criterion="output_mse", timesteps=3),
        }
        if method not in self.scores:
            self.scores[method] = self._score(made[method]())
        return self.scores[method].plan(keep=keep)

    def _steps(self, most: int) -> int:
        return min(most, self.base.steps)

    def _score(self, method: gp.LaptopDiff) -> LayerScores:
        options = dict(self.base.options)
        method = method.changed(steps=self.base.steps, guidance_scale=options.pop("guidance_scale", None))
        return gp.score(
            self.pipe,
            method,
            prompts=self.prompts,
            operating_point=self.base.point,
            pipeline_options=options,
            progress=False,
        )

    def _unscored(self, method: str, keep: float, seed: int) -> gp.PruningPlan:
        """The same candidates and budget with other losses: drawn, or by place in the list."""
        self.plan("laptop", max(BUDGETS))
        if "laptop" not in self.scores:
            self.scores["laptop"] = self._score(gp.LaptopDiff(of="macs", additivity_sets=0))
        scores = dataclasses.replace(self.scores["laptop"], additivity=None, order=None)
        draw = random.Random(seed)
        losses = {}
        for name, candidate in sorted(scores.candidates.items()):
            saved = candidate.saves["macs"]
            if method == "random":
                losses[name] = draw.random() * saved
            else:  # odd places of every list first, whole blocks and ResNet branches alone
                number = int(next(part for part in reversed(name.rpartition(":")[0].split(".")) if part.isdigit()))
                whole = name.endswith(":block") or ".resnets." in name
                losses[name] = saved * ((1 if number % 2 else 10) if whole else 1000)
        scores = dataclasses.replace(scores, losses=losses)
        changes = {"max_consecutive": None} if method == "random" else {"max_consecutive": None, "protect_first": 0}
        plan = scores.plan(keep=keep, **changes)
        return dataclasses.replace(plan, made_by={**plan.made_by, "method": method, "seed": seed})

    def _tiny_fusion(self, keep: float, seed: int) -> gp.PruningPlan:
        options = dict(self.base.options)
        method = gp.TinyFusion(
            keep=keep,
            of="macs",
            kinds=("branch",) if self.base.name == "unet" else ("block",),
            train_steps=self.train_steps,
            batch_size=16,
            learning_rate=5e-3,  # published: 1e-3 over an epoch
            ema_decay=0.95,
            steps=self.base.steps,
            guidance_scale=options.pop("guidance_scale", None),
            seed=seed,
        )
        return gp.make_plan(
            self.pipe,
            method,
            prompts=self.prompts,
            operating_point=self.base.point,
            pipeline_options=options,
            progress=False,
        )

    def reports(self) -> dict[str, Any]:
        """Additivity and seconds of the plans on disk."""
        found = {}
        for folder in sorted((self.work / "plans").glob("*@*")):
            made_by = json.loads((folder / "plan.json").read_text())["made_by"]
            found[folder.name] = {
                key: made_by[key]
                for key in ("additivity", "seconds", "selection", "layers", "budget", "calls")
                if key in made_by
            }
        return found
