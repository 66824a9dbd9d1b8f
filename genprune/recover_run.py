"""From a pruned pipeline's folder to a recovered one: open, train, save; what `genprune recover` does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from genprune.denoising.capture import takes_prompts
from genprune.errors import BadCalibrationData, GenpruneError, PlanMismatch
from genprune.files import whole_folder
from genprune.model_source import MINIATURE, MINIATURES, ModelSource
from genprune.plan import PruningPlan
from genprune.prune_run import disk_errors, prompt_lines
from genprune.recovery import NormalizedDistillation, RecoveryResult
from genprune.widths import PRUNING_KEY

NOTE = "recovery.json"  # beside the pipeline's model_index.json
PICTURES = 2048  # most train scenes of a miniature that one run reads; a longer one goes over them again
_POINTS = 50  # of the curve that the note keeps

# What a miniature learns quickly with: it is small, and 32 rows a step are cheap there.
_MINIATURE_SETTINGS = {
    "steps": 300,
    "batch_size": 32,
    "learning_rate": 3e-4,
    "weight_decay": 0.0,
    "prompt_dropout": 0.1,
    "ema_decay": 0.99,
    "feature_reduction": "mean",
    "teacher_steps": 20,
}
_WARMUP_STEPS = 20


@dataclass(frozen=True)
class RecoveryData:
    """What a pipeline is recovered on.

    Args:
        prompts: of a text-to-image pipeline, or class labels; None for an unconditional one.
        pictures: `(n, 3, H, W)` in [0, 1] or PIL images, one a prompt; None: the teacher draws.
        name: where they come from, for the note.
    """

    prompts: Sequence[Any] | None = field(default=None, repr=False)
    pictures: Any = field(default=None, repr=False)
    name: str = "drawn by the teacher"

    def _parts(self) -> dict[str, Any]:
        return {"prompts": self.prompts, "pictures": self.pictures}

    def to_json(self) -> dict[str, Any]:
        """Name, counts, and a hash of prompts and pictures."""
        digest = hashlib.sha256(json.dumps(self.prompts, ensure_ascii=False).encode())
        for picture in () if self.pictures is None else self.pictures:
            digest.update((picture.numpy() if isinstance(picture, torch.Tensor) else picture).tobytes())
        counts = {name: 0 if values is None else len(values) for name, values in self._parts().items()}
        return {"name": self.name, **counts, "sha256": digest.hexdigest()}


def default_method(teacher: ModelSource, **given: Any) -> NormalizedDistillation:
    """The settings to start from, with `given` on top; those of a miniature suit its size.

    Raises:
        GenpruneError: an unknown name in `given`, or a value out of range.
    """
    if not teacher.is_miniature:
        return NormalizedDistillation().changed(**given)
    from genprune import miniature

    values: dict[str, Any] = dict(_MINIATURE_SETTINGS)
    options = miniature.call_options(MINIATURES[teacher.name])
    values["teacher_guidance"] = options.get("guidance_scale")
    if not {"guidance_scale", "true_cfg_scale"} & options.keys():
        # distilled to few steps: it never sees an empty prompt, and its answer is not the one that the data ask for
        values |= {"prompt_dropout": 0.0, "task_weight": 0.0}
    values |= given
    values.setdefault("warmup_steps", min(_WARMUP_STEPS, values["steps"] // 2))
    return NormalizedDistillation().changed(**values)


def check_pair(pruned: ModelSource, teacher: ModelSource) -> None:
    """Refuse what cannot be student and teacher, before a weight is read.

    Raises:
        GenpruneError: a bare model, or the same model twice. PlanMismatch: another host, or the two in each other's
        place.
    """
    for source, what in ((pruned, "the pruned model"), (teacher, "the teacher")):
        if source.kind != "pipeline":
            raise GenpruneError(
                f"{what} '{source.name}' is a model without a pipeline that turns prompts into training data; "
                "expected a whole pipeline. Pass the pipeline's folder, or call gp.recover(model, dense, method, "
                "data=...) in Python."
            )
    if pruned.place == teacher.place:
        raise GenpruneError(
            f"'{pruned.name}' is the pruned model and its teacher; expected two. Pass the folder that "
            "`genprune prune` wrote and, as teacher, the model that it was pruned from."
        )
    if PRUNING_KEY in teacher.config and PRUNING_KEY not in pruned.config:
        raise PlanMismatch(
            f"the teacher '{teacher.name}' is pruned and '{pruned.name}' is not; expected the pruned model first and "
            "the dense one as teacher. Pass them the other way round."
        )
    hosts = [str(source.config.get("_class_name")).removeprefix("Pruned") for source in (pruned, teacher)]
    if hosts[0] != hosts[1]:
        raise PlanMismatch(
            f"'{pruned.name}' has a {hosts[0]}, the teacher '{teacher.name}' a {hosts[1]}; expected the same. Pass "
            "the model that it was pruned from as teacher."
        )


def miniature_data(count: int, seed: int) -> RecoveryData:
    """Scenes of the miniatures' train split: pictures `(count, 3, 64, 64)` in [0, 1], and captions."""
    from genprune import miniature

    scenes = miniature.scenes("train", count, seed)
    pictures = torch.stack([torch.from_numpy(miniature.render(scene).copy()) for scene in scenes])  # (n, H, W, 3)
    pictures = (pictures.permute(0, 3, 1, 2).float() / 255).contiguous()
    return RecoveryData([miniature.caption(scene) for scene in scenes], pictures, "train scenes of the miniature")


def read_data(file: Path | None, teacher: ModelSource, method: NormalizedDistillation) -> RecoveryData:
    """Prompts of a file, for which the teacher draws; for a miniature without one, train scenes and captions.

    Raises:
        BadCalibrationData: the file cannot be read, or is empty.
    """
    if file is not None:
        return RecoveryData(prompt_lines(file), name=f"{file.name}, drawn by the teacher")
    if teacher.is_miniature:
        rows = method.steps * method.batch_size * method.gradient_accumulation
        return miniature_data(min(PICTURES, rows), method.seed)
    return RecoveryData()


def check_data(data: RecoveryData, teacher: Any, flags: str = "--prompts FILE") -> None:
    """Raises `BadCalibrationData` for a text-to-image pipeline without prompts."""
    if data.prompts is None and takes_prompts(teacher):
        raise BadCalibrationData(
            f"{type(teacher).__name__} draws from prompts and none are given; expected some hundred, like those that "
            f"it will be used with. Pass {flags} (only '{MINIATURE}' has prompts of its own)."
        )


def recover_to_folder(
    pruned: ModelSource,
    teacher: ModelSource,
    method: NormalizedDistillation,
    out: Path,
    *,
    data: RecoveryData,
    plan: PruningPlan | None = None,
    pipeline_options: Mapping[str, Any] | None = None,
    checkpoints: Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train the pruned pipeline against the dense one and save it; `out` appears whole at the end, or not at all.

    Args:
        pruned, teacher: see `check_pair`.
        out: free (see `prune_run.check_free`); a pipeline's folder with `recovery.json` in it, or a LoRA's.
        data: what to train on.
        plan: what the pruned model was cut by, where it is a stock export with renumbered blocks.
        pipeline_options: keyword arguments of the teacher's call.
        checkpoints: where checkpoints and the curve stay; a second run goes on from there.
        device, dtype: to train on, in float32, and to save in.
        say: told what is going on, one line a step.

    Returns:
        What `recovery.json` says.

    Raises:
        GenpruneError: models and data do not fit, the loss diverges, or the folder cannot be written. `out` is then
        as it was.
    """
    import genprune as gp
    from genprune.recovery.lora_training import save_lora

    options = teacher.call_options | dict(pipeline_options or {})
    say(f"Loading {teacher.name} and {pruned.name}")
    dense = teacher.load(device)
    check_data(data, dense)
    small = pruned.load(device)
    say(f"Recovering: {method.steps} steps of {method.batch_size * method.gradient_accumulation} rows")
    result = gp.recover(
        small,
        dense,
        method,
        prompts=data.prompts,
        data=data.pictures,
        plan=plan,
        output_dir=checkpoints,
        resume=checkpoints is not None,
        pipeline_options=options,
        progress=progress,
    )
    say("Saving")
    told = note(pruned, teacher, method, data, result, options, device)
    with disk_errors(out), whole_folder(out) as stage:
        if method.lora_rank is None:
            small.to("cpu", dtype or torch.float32).save_pretrained(stage)
        else:
            save_lora(small, stage)
        (stage / NOTE).write_text(json.dumps(told, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return told


def note(
    pruned: ModelSource,
    teacher: ModelSource,
    method: NormalizedDistillation,
    data: RecoveryData,
    result: RecoveryResult,
    options: Mapping[str, Any],
    device: torch.device | str,
    processes: int = 1,
) -> dict[str, Any]:
    """How a recovery came about: command, versions, hardware, data, settings, figures and the curve's outline."""
    from genprune.bench.result import environment

    figures = {**result.figures, "steps": result.steps, **ends(result.curve)}
    if torch.device(device).type == "cuda":
        figures["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return {
        **environment(device, processes),
        "kind": "recovery",
        "pruned": pruned.name,
        "teacher": teacher.name,
        "seeds": {"recovery": method.seed},
        "data": data.to_json(),
        "settings": method.to_json(),
        "pipeline_options": dict(options),
        "feature_pairs": [list(pair) for pair in result.pairs],
        "figures": figures,
        "curve": outline(result.curve),
    }


def ends(curve: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The unweighted terms over the first and the last tenth of the steps: `task/first`, `task/last`, ...

    `features` is the mean over taps of the squared error. The loss itself may have learned weights in it.
    """
    if not curve:
        return {}
    share = max(1, len(curve) // 10)
    found = {}
    for name in ("task", "output", "features"):
        for place, records in (("first", curve[:share]), ("last", curve[-share:])):
            values = [_raw(record, name) for record in records]
            if None not in values:
                found[f"{name}/{place}"] = sum(values) / len(values)
    return found


def outline(curve: Sequence[Mapping[str, Any]], points: int = _POINTS) -> list[dict[str, Any]]:
    """At most `points` records of a curve, the last among them, with the terms as `ends` has them."""
    every = -(-len(curve) // points) or 1
    kept = curve[::-1][::every][::-1]
    return [
        {"step": record["step"], "loss": record["loss"], "learning_rate": record["learning_rate"]}
        | {name: value for name in ("task", "output", "features") if (value := _raw(record, name)) is not None}
        for record in kept
    ]


def _raw(record: Mapping[str, Any], name: str) -> float | None:
    """A term's mean squared error, or cross-entropy; None where the curve lacks it."""
    terms = record["terms"]
    if name != "features":
        return terms[name]["raw"] if name in terms else None
    taps = [term["raw"] for key, term in terms.items() if key not in ("task", "output")]
    return sum(taps) / len(taps) if taps else None


def lines(told: Mapping[str, Any], out: Path) -> list[str]:
    """What `genprune recover` prints of its note."""
    figures = told["figures"]
    text = [f"{figures['steps']} steps, {figures['seconds']:.0f} s, {figures['samples_per_second']:.1f} rows a second"]
    for name, what in (("task", "to the data"), ("output", "to the teacher's output"), ("features", "of features")):
        if f"{name}/first" in figures:
            first, last = figures[f"{name}/first"], figures[f"{name}/last"]
            text.append(f"mean squared error {what}: {first:.4g} -> {last:.4g} (first and last tenth of the steps)")
    if told["settings"]["lora_rank"] is None:
        text.append(f"recovered pipeline written to {out}; load it with:")
        return [*text, f"  import genprune; pipe = diffusers.DiffusionPipeline.from_pretrained({str(out)!r})"]
    text.append(f"LoRA written to {out}; put it on the pruned pipeline with:")
    return [*text, f"  pipe.load_lora_weights({str(out)!r})"]
