"""Scores and plans of every method in the comparison; scores are kept on disk, one run serving every budget."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import genprune as gp
from genprune import miniature
from genprune.costs import site_costs
from genprune.families import denoiser, find_sites
from genprune.methods import Method
from genprune.plan import PruningPlan
from genprune.scores import Scores

from .bases import Base, operating_point

SCORING_PROMPTS = 64  # of the dev split, for the methods that are calibrated
COMPENSATION_PROMPTS = 64
KINDS = ("heads", "neurons", "channels", "modulation")


def learning(base: Base, steps: int, seed: int = 0, **changes) -> gp.EcoDiff:
    """EcoDiff as it is run here: 70 % of MACs, the base's own sampler with fewer steps."""
    settings = {
        "keep": 0.7,
        "of": "macs",
        "train_steps": steps,
        "batch_size": 4,
        "denoising_steps": base.learn_steps,
        "validate_every": 25,
        "validation_prompts": 16,
        "seed": seed,
    }
    return gp.EcoDiff(**(settings | changes))


def methods(base: Base, steps: int) -> dict[str, Method]:
    """Every method that scores, by its name in the tables."""
    guidance = base.options.get("guidance_scale")
    calibrated = {"steps": base.steps, "guidance_scale": guidance}
    return {
        "random": gp.Random(seed=0),
        "random, seed 1": gp.Random(seed=1),
        "random, seed 2": gp.Random(seed=2),
        "magnitude": gp.Magnitude(),
        "taylor": gp.Taylor(**calibrated),
        "obs": gp.OBS(**calibrated, timesteps=10),
        "ecodiff": learning(base, steps),
        "ecodiff, per-step loss": learning(base, steps, objective="per_step"),
    }


class Planner:
    """Scores of one base's methods, from disk where they have been computed before."""

    def __init__(self, base: Base, pipe, folder: Path, train_steps: int, prompts: int) -> None:
        self.base, self.pipe, self.folder = base, pipe, folder / base.name
        self.methods = methods(base, train_steps)
        self.prompts = miniature.prompts("dev", prompts, seed=1)
        self.point = operating_point(pipe, base)
        self.kinds = tuple(kind for kind in find_sites(pipe).kinds() if kind in KINDS)

    def scores(self, name: str) -> Scores:
        """The scores of a method, computed once."""
        method = self.methods[name]
        file = self._file(name)
        if file.is_file():
            return self._read(method, file)
        prompts = self.prompts if method.trains else self.prompts[:SCORING_PROMPTS]
        # guidance that the method passes on itself
        options = {key: value for key, value in self.base.options.items() if key != "guidance_scale" or method.trains}
        began = time.perf_counter()
        scores = gp.score(
            self.pipe,
            method,
            prompts=None if name.startswith(("random", "magnitude")) else prompts,
            operating_point=self.point,
            pipeline_options=options if not name.startswith(("random", "magnitude")) else None,
            output_dir=self.folder / file.stem if method.trains else None,
            resume=method.trains,
        )
        notes = {"seconds": f"{time.perf_counter() - began:.1f}", "made_by": json.dumps(scores.made_by)}
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in scores.values.items()}, file, metadata=notes)
        return scores

    def _read(self, method: Method, file: Path) -> Scores:
        model = denoiser(self.pipe)
        costs = site_costs(model, self.point)
        return Scores(load_file(file), method, gp.plan_base(model), costs, costs.total, _notes(file)["made_by"])

    def curves(self) -> dict[str, list]:
        """Training curves of the methods that train, thinned."""
        found = {}
        for name, method in self.methods.items():
            file = self._file(name).with_suffix("") / "curve.json"
            if method.trains and file.is_file():
                curve = json.loads(file.read_text())
                kept = [record for i, record in enumerate(curve) if i % 5 == 0 or "validation_loss" in record]
                found[name] = [{key: float(f"{value:.4g}") for key, value in record.items()} for record in kept]
        return found

    def notes(self) -> dict[str, dict]:
        """What was scored with, and how long it took."""
        return {name: _notes(self._file(name)) for name in self.methods if self._file(name).is_file()}

    def _file(self, name: str) -> Path:
        return self.folder / f"{name.replace(', ', '-').replace(' ', '-')}.safetensors"

    def plan(self, name: str, keep: float, of: str) -> PruningPlan:
        """A plan at one budget, over all kinds that narrow layers and that the method scores."""
        scores = self.scores(name)
        scored = {scores.costs.sites[site].kind for site in scores.values}
        return scores.plan(keep, of, kinds=tuple(kind for kind in self.kinds if kind in scored))


def _notes(file: Path) -> dict:
    with safe_open(file, framework="pt") as opened:
        notes = opened.metadata()
    return {"seconds": float(notes["seconds"]), "made_by": json.loads(notes["made_by"])}


def shuffled(plan: PruningPlan, seed: int) -> PruningPlan:
    """The plan with as many units in every site, but others: what the choice within layers is worth."""
    keep: dict[str, Tensor] = {}
    for index, (name, mask) in enumerate(sorted(plan.keep.items())):
        generator = torch.Generator().manual_seed(seed * 100_003 + index)
        keep[name] = mask[torch.randperm(len(mask), generator=generator)]
    return dataclasses.replace(plan, keep=keep, made_by={**plan.made_by, "shuffled": seed})


def cut_copy(base: Base, pipe, plan: PruningPlan, compensation: str | None = None):
    """A pipeline with a cut denoiser; everything else is shared. `compensation`: see `gp.compensate`, or None."""
    slot = "unet" if hasattr(pipe, "unet") else "transformer"
    small = copy.copy(pipe)
    small.__dict__[slot] = copy.deepcopy(getattr(pipe, slot))
    if compensation is not None:
        gp.compensate(
            small,
            plan,
            miniature.prompts("dev", COMPENSATION_PROMPTS, seed=1),
            method="bias" if compensation == "bias" else "least_squares",
            sequential=compensation == "sequential",
            steps=base.steps,
            timesteps=10,
            guidance_scale=base.options.get("guidance_scale"),
            batch_size=16,
            pipeline_options={key: value for key, value in base.options.items() if key != "guidance_scale"},
            progress=False,
        )
    gp.cut(small.__dict__[slot], plan)
    return small
