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

PRUNED, BASELINES = "taylor", ("magnitude", "random")


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does; the defaults take a few minutes on two CPU cores.

    Args:
        keep, of: the budget of every plan.
        prompts: pictures that each candidate draws, >= 4; captions of the miniature's test split.
        steps: denoising steps a picture.
        guidance_scale: of classifier-free guidance.
        calibration_prompts: captions and pictures of the dev split that Taylor scores on.
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
    latency_rounds: int = 15
    memory: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prompts < 4:
            raise GenpruneError(f"--prompts is {self.prompts}; expected at least 4 to compare sets of pictures.")

    @classmethod
    def quick(cls, **changes: Any) -> DemoSettings:
        """A first look: few pictures and few steps. Its quality figures mean little."""
        settings = {"prompts": 8, "steps": 8, "calibration_prompts": 8, "latency_rounds": 5} | changes
        return cls(**settings)


def run_demo(
    out: Path,
    settings: DemoSettings,
    *,
    force: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Plan, cut, save, reload, draw, measure and report; `out` appears whole at the end, or not at all.

    Writes `report.html`, `result.json`, the pruned pipeline in `pipeline/`, its plan in `plan/`, the baselines' plans
    in `baselines/` and every picture in `images/`.

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
        say(f"Drawing {settings.prompts} prompts with each of 4 pipelines, then measuring")
        result = run_benchmark(
            {
                "dense": _candidate("dense", base),
                PRUNED: _candidate(PRUNED, str(stage / "pipeline")),
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
    """Score, plan, cut, save and reload; the plans' figures and whether the reloaded weights are the cut ones."""
    from diffusers import DiffusionPipeline

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
    pipe.save_pretrained(stage / "pipeline")
    again = DiffusionPipeline.from_pretrained(stage / "pipeline")
    cut, loaded = pipe.unet.state_dict(), again.unet.state_dict()
    return {
        "plans": {name: plan.to_json() for name, plan in plans.items()},
        "reload_is_exact": cut.keys() == loaded.keys() and all(torch.equal(cut[key], loaded[key]) for key in cut),
        "overlap_with_taylor": {name: plans[PRUNED].overlap(plans[name]) for name in BASELINES},
    }


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
    return {**result, "kind": "genprune-demo", "figures": figures, "demo": {**asdict(settings), **chain}}


def _write(stage: Path, result: dict[str, Any]) -> None:
    from genprune.bench.result import write_result
    from genprune.demo_page import write_demo_page

    write_result(stage / "result.json", result)
    write_demo_page(stage / "report.html", result, stage / "images")
