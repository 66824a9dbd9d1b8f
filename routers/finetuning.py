"""`finetune_experts`: every expert of a router trained against the dense model, on what is routed to it."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genprune.cutting import cut
from genprune.errors import BadCalibrationData, GenpruneError, PlanMismatch
from genprune.families import denoiser, denoiser_slot
from genprune.files import whole_file
from genprune.plan import PruningPlan
from genprune.recovery.distillation import NormalizedDistillation
from genprune.recovery.loop import RecoveryResult
from genprune.recovery.models import on_device
from genprune.recovery.pipeline_data import PipelineData, cache_folder, pipeline_data
from genprune.recovery.recovering import recover
from genprune.recovery.training import RecoveryFailed
from genprune.routers.experts import Expert

logger = logging.getLogger(__name__)
FORMAT_VERSION = 1
DONE, WEIGHTS, LORA = "finetuned.json", "weights.safetensors", "pytorch_lora_weights.safetensors"
SPLITS = ("usage", "equal")


@dataclass(frozen=True)
class _Share:
    """What one expert is trained on.

    Args:
        rows: of the data.
        noise_range: of the timesteps, as shares of the training timesteps.
        usage: its weight where steps are split by usage.
    """

    rows: list[int] = field(repr=False)
    noise_range: tuple[float, float] = (0.0, 1.0)
    usage: float = 0.0


def finetune_experts(
    pipe: Any,
    router: Any,
    method: NormalizedDistillation,
    *,
    prompts: Sequence[str],
    output_dir: str | os.PathLike,
    data: Any = None,
    latents_dir: str | os.PathLike | None = None,
    assignment: Sequence[int] | None = None,
    split: str = "usage",
    resume: bool = False,
    checkpointing_steps: int = 500,
    checkpoints_total_limit: int = 2,
    pipeline_options: Mapping[str, Any] | None = None,
    accelerator: Any = None,
    progress: bool = True,
) -> Any:
    """Train each expert of a router by `gp.recover`, from the dense weights it was cut from; `pipe` is not changed.

    Latents are drawn or encoded once for all experts. Every expert starts from the dense weights and sees the prompts
    that are routed to it; an expert of a timestep router sees all prompts, at the timesteps it serves.

    Args:
        pipe: the dense pipeline that the router was trained for: base of every expert and its teacher.
        router: a `PromptRouter` or a `TimestepRouter`, its experts not fine-tuned yet.
        method: how. `steps` are those of all experts together. With `lora_rank` an expert gets a LoRA, otherwise all
            its weights are trained.
        prompts: of the training data.
        output_dir: gets `expert-00`, ... with checkpoints, curve, and the LoRA or the weights that changed.
        data: clean latents `(n, C, h, w)`, images `(n, 3, H, W)` in [0, 1] or PIL images, one a prompt. None: the
            dense pipeline draws a latent for each prompt, once.
        latents_dir: keeps them, and gives those back that an earlier run left there, such as `teacher_data` of
            `train_router`. None: `output_dir/teacher_data`.
        assignment: the expert of each prompt, instead of where the router sends it: for controls.
        split: of the steps over the experts that have data: `usage` (as their prompts, or as the width of their noise
            range) or `equal`. Each gets at least one.
        resume: go on in `output_dir`: experts that are done are not done again.
        checkpointing_steps, checkpoints_total_limit, pipeline_options, accelerator, progress: see `gp.recover`.

    Returns:
        A copy of the router with the fine-tuned experts, whose files are in `output_dir`. An expert that no prompt is
        routed to keeps its weights as cut, and a warning says so.

    Raises:
        BadCalibrationData: prompts, data and assignment do not fit. PlanMismatch: the router is of another base, its
        experts are fine-tuned, or `output_dir` is of another run. RecoveryFailed: as `gp.recover`.
    """
    from accelerate import PartialState

    _check(pipe, router, method, split)
    if assignment is not None:
        assignment = _checked_assignment(assignment, len(prompts), len(router.experts), router.kind)
    out = Path(output_dir)
    _check_output(out, resume)
    state = accelerator or PartialState(cpu=not torch.cuda.is_available())
    cache = cache_folder(out) if latents_dir is None else Path(latents_dir)
    everything = _all_data(pipe, method, prompts, data, pipeline_options, cache, state, progress)
    shares = _shares(router, prompts, len(everything.clean), assignment)
    steps = split_steps(method.steps, [share.usage for share in shares], split)
    tuned = []
    for number, (expert, share, count) in enumerate(zip(router.experts, shares, steps, strict=True)):
        if not share.rows:
            logger.warning(
                "no training prompt is routed to expert %d: it is not fine-tuned and keeps its weights as cut", number
            )
            tuned.append(expert)
            continue
        part = everything.part(share.rows, share.noise_range)
        one = method.changed(steps=count)
        described = {"plan": plan_sha256(expert.plan), "method": one.to_json(), "data": part.fingerprint}
        folder = out / f"expert-{number:02d}"
        if not _is_done(folder, described):
            if progress:
                logger.info("expert %d: %d steps on %d latents", number, count, len(share.rows))
            options = {
                "resume": resume,
                "checkpointing_steps": checkpointing_steps,
                "checkpoints_total_limit": checkpoints_total_limit,
                "accelerator": accelerator,
                "progress": progress,
            }
            try:
                result, changed = _train(pipe, expert, one, part, folder, options)
            except RecoveryFailed as failure:
                raise RecoveryFailed(f"expert {number}: {failure}", failure.step, failure.since) from None
            if state.is_main_process:
                _save(folder, one, described, part, result, changed)
            state.wait_for_everyone()
        tuned.append(replace(expert, **_files(folder, one)))
    return router.with_experts(tuned)


def split_steps(total: int, usage: Sequence[float], split: str = "usage") -> list[int]:
    """`total` steps over experts by largest remainder, at least 1 for each with a usage above 0, 0 for the others.

    Args:
        usage: weights, >= 0.
        split: `usage`, or `equal` over those above 0.

    Raises:
        BadCalibrationData: fewer steps than experts with data.
    """
    weights = [float(value > 0) for value in usage] if split == "equal" else [float(value) for value in usage]
    used = [index for index, weight in enumerate(weights) if weight > 0]
    if not used or total < len(used):
        raise BadCalibrationData(
            f"{total} steps for {len(used)} experts with data; expected at least one for each, and one expert. Raise "
            "the method's steps, or pass prompts that are routed."
        )
    quotas = [total * weight / sum(weights) for weight in weights]
    steps = [int(quota) for quota in quotas]
    # the lower index where remainders are equal: the split is a function of its arguments
    for index in sorted(used, key=lambda index: (steps[index] - quotas[index], index))[: total - sum(steps)]:
        steps[index] += 1
    for index in used:
        if steps[index] == 0:
            steps[max(used, key=lambda other: (steps[other], -other))] -= 1
            steps[index] = 1
    return steps


def plan_sha256(plan: PruningPlan) -> str:
    """Hash of what a plan does to a model: its base, masks and operations."""
    digest = hashlib.sha256(json.dumps([plan.base.sites_sha256, list(plan.ops)], sort_keys=True).encode())
    for name, mask in sorted(plan.keep.items()):
        digest.update(name.encode() + mask.numpy().tobytes())
    for name, value in sorted(plan.tensors.items()):
        digest.update(name.encode() + value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check(pipe: Any, router: Any, method: Any, split: str) -> None:
    if not isinstance(method, NormalizedDistillation):
        raise GenpruneError(
            f"method is {method!r}; expected a way to recover. Pass gp.NormalizedDistillation(steps=1000), say."
        )
    if split not in SPLITS:
        raise GenpruneError(f"split={split!r}; expected one of {', '.join(SPLITS)}. Pass one of them.")
    if denoiser_slot(pipe) is None:
        raise GenpruneError(
            f"pipe is a {type(pipe).__name__}; expected the dense pipeline, which encodes prompts and draws. Pass the "
            "pipeline that the router was trained for."
        )
    router.check_base(denoiser(pipe))
    for number, expert in enumerate(router.experts):
        if expert.lora is not None or expert.weights is not None:
            raise PlanMismatch(
                f"expert {number} is fine-tuned already ('{expert.lora or expert.weights}'); expected experts as they "
                "were trained. Pass the router that train_router wrote, with resume=True to go on in output_dir."
            )


def _checked_assignment(assignment: Sequence[int], prompts: int, experts: int, kind: str) -> list[int]:
    if kind != "prompt":
        raise BadCalibrationData(
            "an assignment of prompts is given with a timestep router, whose experts share all prompts; expected "
            "none. Leave it out."
        )
    given = list(assignment)
    if len(given) != prompts:
        raise BadCalibrationData(
            f"{len(given)} experts are assigned to {prompts} prompts; expected one for each. Pass one a prompt."
        )
    for index, expert in enumerate(given):
        if isinstance(expert, bool) or not isinstance(expert, int) or not 0 <= expert < experts:
            raise BadCalibrationData(
                f"assignment[{index}] is {expert!r}; expected the number of an expert, 0 to {experts - 1}. Pass whole "
                "numbers."
            )
    return given


def _check_output(out: Path, resume: bool) -> None:
    """Refuse experts of an earlier run, before anything is computed."""
    found = sorted(path.name for path in out.glob("expert-*"))
    if found and not resume:
        raise GenpruneError(
            f"'{out}' has {found[-1]} of an earlier fine-tuning; expected none. Pass resume=True to go on there, or "
            "another output_dir."
        )


def _all_data(
    pipe: Any,
    method: NormalizedDistillation,
    prompts: Sequence[str],
    data: Any,
    options: Mapping[str, Any] | None,
    cache: Path,
    state: Any,
    progress: bool,
) -> PipelineData:
    """Latents and conditions of all prompts, drawn or encoded once: by the first process, the others read them."""
    main = state.is_main_process
    with state.main_process_first(), on_device((pipe,), state.device):
        given = (prompts, data, dict(options or {}), cache, progress and main, main)
        return pipeline_data(pipe, pipe, method, *given)


def _shares(router: Any, prompts: Sequence[str], rows: int, assignment: list[int] | None) -> list[_Share]:
    """Rows, timesteps and weight of each expert."""
    if router.kind == "timestep":
        bounds = [0.0, *router.boundaries, 1.0]
        return [_Share(list(range(rows)), pair, pair[1] - pair[0]) for pair in zip(bounds, bounds[1:])]
    experts = router.route(list(prompts)).experts if assignment is None else assignment
    taken: list[list[int]] = [[] for _ in router.experts]
    for row in range(rows):
        taken[experts[row % len(experts)]].append(row)
    return [_Share(found, usage=float(len(found))) for found in taken]


def _train(
    pipe: Any, expert: Expert, method: NormalizedDistillation, part: PipelineData, folder: Path, options: Mapping
) -> tuple[RecoveryResult, dict[str, Tensor]]:
    """Train one expert. Returns the result, and the parameters that differ from those of the plain cut, by name."""
    student = copy.copy(pipe)
    model = student.__dict__[denoiser_slot(pipe)] = copy.deepcopy(denoiser(pipe)).requires_grad_(True)
    cut(student, expert.plan)
    names = {id(value): name for name, value in model.named_parameters()}
    before = {name: value.detach().cpu().clone() for name, value in model.named_parameters()}
    result = recover(student, pipe, method, data=part, output_dir=folder, **options)
    now = ((names.get(id(value)), value.detach().cpu()) for value in model.parameters())  # a LoRA renames layers
    return result, {name: value for name, value in now if name and not torch.equal(value, before[name])}


def _save(
    folder: Path,
    method: NormalizedDistillation,
    described: Mapping[str, Any],
    part: PipelineData,
    result: RecoveryResult,
    changed: Mapping[str, Tensor],
) -> None:
    """The weights, where no LoRA was trained, which `recover` has written; then the file that says it is done."""
    from safetensors.torch import save_file

    if method.lora_rank is None:
        with whole_file(folder / WEIGHTS) as written:
            save_file({name: value.contiguous() for name, value in changed.items()}, written)
    told = {"format_version": FORMAT_VERSION, "described": dict(described), "steps": result.steps}
    told |= {"rows": len(part.clean), "noise_range": list(part.noise_range), "figures": result.figures}
    with whole_file(folder / DONE) as written:
        written.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _is_done(folder: Path, described: Mapping[str, Any]) -> bool:
    """Whether an expert's training ended. Raises `PlanMismatch` for one of another run."""
    path = folder / DONE
    if not path.is_file():
        return False
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        version, before = int(told["format_version"]), dict(told["described"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlanMismatch(
            f"'{path}' cannot be read ({error}); expected what a fine-tuning wrote. Delete '{folder}' to train this "
            "expert again."
        ) from None
    if version > FORMAT_VERSION:
        raise PlanMismatch(
            f"'{path}' has format {version}, this genprune reads up to {FORMAT_VERSION}. Upgrade with "
            "`pip install -U genprune`."
        )
    now = json.loads(json.dumps(dict(described)))
    if changed := sorted(name for name in {*now, *before} if now.get(name) != before.get(name)):
        raise PlanMismatch(
            f"'{folder}' was trained with another {' and '.join(changed)} than this run has; expected the same. "
            "Resume with the same router, method, prompts and data, or start anew in another output_dir."
        )
    return True


def _files(folder: Path, method: NormalizedDistillation) -> dict[str, Path]:
    """The fine-tuned file of an expert, as `Expert` has it."""
    name, file = ("weights", WEIGHTS) if method.lora_rank is None else ("lora", LORA)
    if not (folder / file).is_file():
        raise PlanMismatch(
            f"'{folder / file}' is missing, and {DONE} beside it says that this expert is done; expected both. Delete "
            f"'{folder}' to train it again."
        )
    return {name: folder / file}
