"""`genprune demo`: the whole chain on the embedded miniature, offline, ending in a page to look at."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genprune.errors import GenpruneError
from genprune.files import whole_folder
from genprune.model_source import MINIATURE, miniature_folder
from genprune.prune_run import check_free, disk_errors

PRUNED, RECOVERED, BASELINES = "taylor", "recovered", ("magnitude", "random")
DAMAGED = "random"  # the plan that is recovered: Taylor's leaves next to nothing to win back


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does; the defaults take a few minutes on two CPU cores.

    Args:
        keep, of: the budget of every plan.
        prompts: pictures that each candidate draws, >= 4; captions of the miniature's test split.
        steps: denoising steps a picture.
        guidance_scale: of classifier-free guidance.
        calibration_prompts: captions and pictures of the dev split that Taylor scores on.
        recovery_steps, recovery_batch: of the training after the cut, on scenes of the train split.
        latency_rounds: timed rounds; every round times every candidate. 0 leaves times out.
        memory: measure peak memory, each candidate in a fresh process.
        seed: of plans, scenes and noise.
    """

    keep: float = 0.7
    of: str = "macs"
    prompts: int = 48
    steps: int = 20
    guidance_scale: float = 3.5
    calibration_prompts: int = 32
    recovery_steps: int = 40
    recovery_batch: int = 16
    latency_rounds: int = 15
    memory: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prompts < 4:
            raise GenpruneError(f"--prompts is {self.prompts}; expected at least 4 to compare sets of pictures.")
        for name in ("recovery_steps", "recovery_batch"):
            if getattr(self, name) < 1:
                raise GenpruneError(f"{name} is {getattr(self, name)}; expected at least 1. Leave it out.")

    @classmethod
    def quick(cls, **changes: Any) -> DemoSettings:
        """A first look: few pictures and few steps. Its quality figures mean little."""
        settings = {"prompts": 8, "steps": 8, "calibration_prompts": 8, "latency_rounds": 5}
        return cls(**(settings | {"recovery_steps": 10, "recovery_batch": 8} | changes))


def run_demo(
    out: Path,
    settings: DemoSettings,
    *,
    force: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Plan, cut, recover, save, reload, draw, measure and report; `out` appears whole at the end, or not at all.

    Writes `report.html`, `result.json`, the pruned pipeline in `pipeline/`, the plan at random after a brief
    recovery in `recovered/`, its plan in `plan/`, the baselines' plans in `baselines/` and every picture in `images/`.

    Args:
        out: must not exist, or be empty; with `force` an earlier result is replaced.
        settings: sizes and budget.
        progress: show bars.
        say: told what is going on, one line a step.

    Returns:
        The result as written to `result.json`.

    Raises:
        FolderInTheWay: `out` holds something. BudgetUnreachable: `keep` is too small. In both cases, as after
        Ctrl-C, `out` is as it was.
    """
    from genprune.bench import Sampling, miniature_data, run_benchmark

    check_free(out, force)
    with disk_errors(out), whole_folder(out) as stage:
        base = str(miniature_folder())
        chain = _chain(stage, settings, progress, say)
        say(f"Drawing {settings.prompts} prompts with each of 5 pipelines, then measuring")
        result = run_benchmark(
            {
                "dense": _candidate("dense", base),
                PRUNED: _candidate(PRUNED, str(stage / "pipeline")),
                RECOVERED: _candidate(RECOVERED, str(stage / "recovered")),
                **{name: _candidate(name, base, str(stage / "baselines" / name)) for name in BASELINES},
            },
            stage,
            data=miniature_data("test", settings.prompts, settings.seed),
            reference="dense",
            sampling=Sampling(
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                seed=settings.seed,
                batch_size=8,
            ),
            latency_rounds=settings.latency_rounds,
            memory=settings.memory,
            progress=progress,
        )
        say("Writing the report")
        result = _finished(result, chain, settings, {str(stage) + os.sep: "", base: MINIATURE})
        _write(stage, result)
    return result


def _chain(stage: Path, settings: DemoSettings, progress: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Score, plan, cut, recover, save and reload: plans, recovery, whether the reloaded weights are those saved."""
    import genprune as gp
    from genprune.methods import method_named

    say("Loading the embedded miniature")
    pipe = gp.miniature.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    budget = {"keep": settings.keep, "of": settings.of, "seed": settings.seed}
    calibration = _calibration(settings)
    plans = {}
    for name in (PRUNED, *BASELINES):
        say(f"Planning by {name}: keep {settings.keep:.0%} of {settings.of}")
        method = method_named(name, **budget)
        given = calibration if "gradients" in method.criterion().needs else {}
        plans[name] = gp.make_plan(pipe, method, progress=progress, **given)
        plans[name].save(stage / ("plan" if name == PRUNED else f"baselines/{name}"))
    say("Cutting, saving, and loading the result again")
    gp.cut(pipe, plans[PRUNED])
    exact = _saved_exactly(pipe, stage / "pipeline")
    damaged = gp.miniature.load_pipeline()
    damaged.set_progress_bar_config(disable=True)
    recovery = _recover(gp.cut(damaged, plans[DAMAGED]), settings, progress, say)
    exact = _saved_exactly(damaged, stage / "recovered") and exact
    return {
        "plans": {name: plan.to_json() for name, plan in plans.items()},
        "recovery": recovery,
        "reload_is_exact": exact,
        "overlap_with_taylor": {name: plans[PRUNED].overlap(plans[name]) for name in BASELINES},
    }


def _recover(pipe: Any, settings: DemoSettings, progress: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Train the cut pipeline against the dense one for a moment, in place; what `genprune recover` notes of it."""
    import genprune as gp
    from genprune.model_source import open_source
    from genprune.recover_run import default_method, ends, miniature_data

    steps, batch_size = settings.recovery_steps, settings.recovery_batch
    rows = steps * batch_size
    say(f"Recovering what the plan at random left: {steps} steps of {batch_size} train scenes")
    method = default_method(open_source(MINIATURE), steps=steps, batch_size=batch_size, seed=settings.seed)
    data = miniature_data(rows, settings.seed)
    teacher = gp.miniature.load_pipeline()
    result = gp.recover(pipe, teacher, method, prompts=data.prompts, data=data.pictures, progress=progress)
    return {
        "rows": rows,
        "seconds": result.figures["seconds"],
        "errors": ends(result.curve),
        "settings": method.to_json(),
        "data": data.to_json(),
    }


def _saved_exactly(pipe: Any, folder: Path) -> bool:
    """Save a pipeline; whether the ordinary loading gives its weights again, bit for bit."""
    from diffusers import DiffusionPipeline

    pipe.save_pretrained(folder)
    kept, loaded = pipe.unet.state_dict(), DiffusionPipeline.from_pretrained(folder).unet.state_dict()
    return kept.keys() == loaded.keys() and all(torch.equal(kept[key], loaded[key]) for key in kept)


def _calibration(settings: DemoSettings) -> dict[str, Any]:
    """Captions of the dev split and their pictures, which spares drawing some first."""
    import genprune as gp

    scenes = gp.miniature.scenes("dev", settings.calibration_prompts, settings.seed)
    pictures = torch.stack([torch.from_numpy(gp.miniature.render(scene).copy()) for scene in scenes])  # (n, H, W, 3)
    return {
        "prompts": [gp.miniature.caption(scene) for scene in scenes],
        "data": pictures.permute(0, 3, 1, 2).float() / 255,
    }


def _candidate(name: str, model: str, plan: str | None = None):
    from genprune.bench import Candidate

    return Candidate(name, model=model, plan=plan)


def _finished(result: dict, chain: dict, settings: DemoSettings, places: dict[str, str]) -> dict[str, Any]:
    """The result with the chain's part, and with folders told relative to the demo's own."""
    from dataclasses import asdict

    for entry in result["candidates"]:
        for field in ("model", "plan"):
            for found, told in places.items():
                if entry[field] is not None:
                    entry[field] = entry[field].replace(found, told)
    figures = {**result["figures"], "reload_is_exact": int(chain["reload_is_exact"])}
    figures |= {"recovery_seconds": chain["recovery"]["seconds"], "recovery_rows": chain["recovery"]["rows"]}
    return {**result, "kind": "genprune-demo", "figures": figures, "demo": {**asdict(settings), **chain}}


def _write(stage: Path, result: dict[str, Any]) -> None:
    from genprune.bench.result import write_result
    from genprune.demo_page import write_demo_page

    write_result(stage / "result.json", result)
    write_demo_page(stage / "report.html", result, stage / "images")
