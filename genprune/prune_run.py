"""From a model's name to a pruned folder: open, plan, cut, save; what `genprune prune` does."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from genprune.cutting import was_cut
from genprune.errors import BadCalibrationData, GenpruneError
from genprune.families import denoiser
from genprune.files import whole_folder
from genprune.methods import Method
from genprune.model_source import MINIATURE, ModelSource
from genprune.plan import PruningPlan
from genprune.planning import with_latency

# A folder with one of these was written by genprune, diffusers or timm: `--force` may replace it, and nothing else.
_KNOWN_CONTENT = ("model_index.json", "config.json", "plan.json", "result.json")
CALIBRATION_PROMPTS = 16  # of the miniature, where no prompts are given
TRAINING_PROMPTS = 100  # likewise, for a method that trains
LATENCY_ROUNDS = 5


class FolderInTheWay(GenpruneError):
    """The output folder exists and holds something."""


def check_free(out: Path, force: bool) -> None:
    """Refuse an output folder that holds something, unless `force` is set and it holds an earlier result.

    Raises:
        FolderInTheWay: before anything is computed.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise FolderInTheWay(f"'{out}' is a file; expected a folder to write to. Pass another --out.")
    if not force:
        raise FolderInTheWay(
            f"'{out}' exists and is not empty; nothing was changed. Pass another --out, or --force to replace it."
        )
    if not any((out / name).is_file() for name in _KNOWN_CONTENT):
        raise FolderInTheWay(
            f"'{out}' holds none of {', '.join(_KNOWN_CONTENT)}, so it is no earlier result; --force replaces only "
            "those. Pass another --out."
        )


@contextmanager
def disk_errors(out: Path):
    """A full disk or a missing permission inside the block becomes one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise GenpruneError(
            f"'{out}' could not be written ({error.strerror}); it is as it was before. Free some space, or pass "
            "another --out."
        ) from error


def prompt_lines(file: Path, option: str = "--prompts") -> list[str]:
    """The prompts in a text file, one a line. Raises `BadCalibrationData`."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadCalibrationData(
            f"the prompts file '{file}' cannot be read ({error}); expected a text file with one prompt a line. "
            f"Check {option}."
        ) from None
    if not any(lines):
        raise BadCalibrationData(f"the prompts file '{file}' is empty; expected one prompt a line. Fill it.")
    return [line for line in lines if line]


def read_prompts(
    file: Path | None, source: ModelSource, method: Method, compensate: str | None = None
) -> list[str] | None:
    """Calibration prompts: from a file, one a line; for the miniature its own where no file is given.

    Raises:
        BadCalibrationData: the method or the compensation needs prompts and there are none, or no pipeline to use
        them.
    """
    scores_on_data = bool({"gradients", "activations", "outputs"} & set(method.facts().needs))
    if scores_on_data and source.kind != "pipeline":
        raise BadCalibrationData(
            f"--method {method.name} scores on data, and '{source.name}' is a model without a pipeline that turns "
            "prompts into them; expected a whole pipeline, or a method that needs no data. Pass --method magnitude, "
            "or call gp.make_plan(model, method, data=...) in Python."
        )
    if compensate and source.kind != "pipeline":
        raise BadCalibrationData(
            f"--compensate measures activations on prompts, and '{source.name}' is a model without a pipeline that "
            "turns prompts into them; expected a whole pipeline. Leave it out, or call gp.compensate(model, plan, "
            "data=...) in Python."
        )
    if file is not None:
        return prompt_lines(file)
    if not scores_on_data and not compensate:
        return None
    if source.is_miniature:
        import genprune as gp

        return gp.miniature.prompts("dev", TRAINING_PROMPTS if method.trains else CALIBRATION_PROMPTS)
    asks = f"--method {method.name} scores" if scores_on_data else "--compensate measures"
    raise BadCalibrationData(
        f"{asks} on prompts, and '{source.name}' comes without any; expected a text file with one prompt a line, 16 "
        f"or more. Pass --prompts FILE (or try --method magnitude alone, which needs none; only '{MINIATURE}' has "
        "prompts of its own)."
    )


def read_options(texts: Iterable[str]) -> dict[str, Any]:
    """Keyword arguments of a pipeline's call from `name=value` texts; a value is JSON, or else text as it stands.

    Raises:
        GenpruneError: a text without `=`. An option that the pipeline lacks is found when it is called.
    """
    options = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not name or not equals:
            raise GenpruneError(
                f"--pipeline-option {text!r} is no option; expected NAME=VALUE. Pass e.g. "
                "--pipeline-option max_sequence_length=256."
            )
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def prune_to_folder(
    source: ModelSource,
    method: Method,
    out: Path,
    *,
    prompts: Sequence[str] | None = None,
    plan_only: bool = False,
    stock: bool = False,
    compensate: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    progress: bool = True,
    latency: bool = True,
    pipeline_options: Mapping[str, Any] | None = None,
    checkpoints: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> PruningPlan:
    """Plan, cut and save; `out` appears whole at the end, or not at all.

    Args:
        source, method, prompts: what to prune, how, and what to calibrate on.
        out: free (see `check_free`); a pipeline's folder, a model's folder, or with `plan_only` a plan's.
        stock: write a stock configuration that loads where genprune is not installed; depth and uniform plans only.
        compensate: how `gp.compensate` refits what reads removed units before the cut; None: it does not.
        device, dtype: to score and time on, and to save in.
        latency: also time the dense model and a cut copy in turns, where both fit in memory.
        pipeline_options: keyword arguments of the pipeline's call while it calibrates.
        checkpoints: where a method that trains keeps checkpoints, logits and curve; it goes on from there.
        say: told what is going on, one line a step.

    Raises:
        GenpruneError: the budget cannot be reached, the calibration data do not fit, the plan has no stock
        configuration, or the folder cannot be written. `out` is then as it was.
    """
    import genprune as gp

    options = source.call_options | dict(pipeline_options or {}) or None
    say(f"Loading {source.name}")
    target = source.load(device, dtype)
    asked = "what its groups say" if method.keep is None else f"keep {method.keep:g} of {method.of}"
    say(f"Planning: {method.name}, {asked}")
    plan = gp.make_plan(
        target,
        method,
        prompts=prompts,
        pipeline_options=options,
        output_dir=checkpoints,
        resume=checkpoints is not None,
        progress=progress,
    )
    if latency:
        plan = _timed(denoiser(target), plan, say)
    if plan_only:
        with disk_errors(out):
            plan.save(out)
        return plan
    if compensate:
        say(f"Compensating: {compensate}")
        given = dict(options or {})
        guidance = given.pop("guidance_scale", None)
        settings = {"method": compensate, "seed": method.seed, "guidance_scale": guidance, "pipeline_options": given}
        done = gp.compensate(target, plan, prompts, progress=progress, **settings)
        noted = {"method": compensate, "seed": method.seed, "layers": len(done.errors)}
        plan = dataclasses.replace(plan, made_by={**plan.made_by, "compensation": noted})
    say("Cutting and saving")
    with disk_errors(out), whole_folder(out) as stage:
        _write(gp.cut(target, plan), source, stage, stock)
    return plan


def _timed(model: nn.Module, plan: PruningPlan, say: Callable[[str], None]) -> PruningPlan:
    """The plan with latency of dense and pruned, or as it is, with the reason said."""
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if was_cut(model):
        say("Latency is not measured: the model was cut before, and the dense one is not here")
    elif (free := _free_bytes(next(model.parameters()).device)) < 2 * size:
        say(f"Latency is not measured: {free / 1e9:.1f} GB are free, two models of {size / 1e9:.1f} GB do not fit")
    else:
        say("Timing dense and pruned in turns (--no-latency leaves it out)")
        try:
            return with_latency(model, plan, rounds=LATENCY_ROUNDS)
        except RuntimeError as error:  # an operation that the device lacks in this precision, or out of memory
            say(f"Latency is not measured: {str(error).strip().splitlines()[0]}")
    return plan


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _write(target: Any, source: ModelSource, stage: Path, stock: bool) -> None:
    import genprune as gp

    if stock:
        gp.export_stock(target, stage)
    elif source.kind == "pipeline":
        target.to("cpu").save_pretrained(stage)
    else:
        gp.save_model(target, stage)


def summary(plan: PruningPlan, out: Path) -> dict[str, Any]:
    """What `genprune prune --json` prints."""
    return {
        "format_version": 1,
        "out": str(out),
        "base": dataclasses.asdict(plan.base),
        "figures": dict(plan.figures),
        "operating_point": dict(plan.operating_point),
        "widths": {name: [int(mask.sum()), mask.numel()] for name, mask in plan.keep.items()},
        "made_by": dict(plan.made_by),
    }
