"""Second-order scores of a layer's output error as a method; with `gp.compensate`, the OBS-Diff recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from genprune.criteria import criterion_named
from genprune.criteria.obs import FORMS, FUSIONS, check_option
from genprune.denoising.replay import STEP_WEIGHTS, check_step_weights, recorded_calls
from genprune.errors import GenpruneError
from genprune.methods.base import UnitMethod, check_range, check_whole


@dataclass(frozen=True)
class OBS(UnitMethod):
    """Units whose consumer layer loses least when the others take over; needs prompts (a pipeline) or data (a model).

    Heads, neurons and channels only: other kinds have no layer that reads their units.

    Args:
        form: `group` (the exact rise of the error) or `columns` (OBS-Diff's sum over a head's columns).
        fuse: heads of a joint attention by the `sum` of both streams' errors, or by reciprocal `rank`.
        relative: errors as a share of the layer's mean squared output, instead of as they are.
        centre: measure about the mean where a layer has a bias, for a compensation that changes it too.
        damping: share of the mean diagonal added to the Hessian, above 0.
        samples: images that a pipeline draws to calibrate on; None: one per prompt, 16 without prompts.
        steps: denoising steps of the runs that draw them, >= 1.
        timesteps: of the calls of each run, how many to measure on, spread evenly; None: all.
        step_weights: of the last and the first step.
        guidance_scale: of those runs; None: the pipeline's default.
        batch_size: images a run, >= 1.
        modules_per_pass: layers measured in one pass over the calls; None: as many as fit in 4 GB.

    Reference:
        OBS-Diff (arXiv 2510.06751): 100 prompts, 25 steps, `form="columns"`, `fuse="rank"`, `centre=False`,
        `allocation="uniform"`, followed by `gp.compensate`.
    """

    form: str = "group"
    fuse: str = "sum"
    relative: bool = False
    centre: bool = True
    damping: float = 0.01
    samples: int | None = None
    steps: int = 20
    timesteps: int | None = None
    step_weights: tuple[float, float] = STEP_WEIGHTS
    guidance_scale: float | None = None
    batch_size: int = 4
    modules_per_pass: int | None = None

    name: ClassVar[str] = "obs"
    scored_kinds: ClassVar[tuple[str, ...]] = ("heads", "neurons", "channels")

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_weights", tuple(self.step_weights))
        super().__post_init__()
        check_option("form", self.form, FORMS)
        check_option("fuse", self.fuse, FUSIONS)
        check_range("damping", self.damping, 0, 100)
        if self.damping == 0:
            raise GenpruneError("damping=0; expected a number above 0, such as 0.01: a Hessian may be singular.")
        for name in ("steps", "batch_size"):
            check_whole(name, getattr(self, name), 1)
        for name in ("samples", "timesteps", "modules_per_pass"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        check_step_weights(self.step_weights)
        if self.guidance_scale is not None:
            check_range("guidance_scale", self.guidance_scale, 0, 1000)

    def criterion(self):
        return criterion_named(self.name)(
            form=self.form,
            fuse=self.fuse,
            relative=self.relative,
            centre=self.centre,
            damping=self.damping,
            modules_per_pass=self.modules_per_pass,
        )

    def calibration(self, target, prompts, data, loss_fn, options: Mapping[str, Any], progress: bool):
        return recorded_calls(
            target,
            prompts,
            data,
            loss_fn=loss_fn,
            samples=self.samples,
            steps=self.steps,
            timesteps=self.timesteps,
            weights=self.step_weights,
            guidance_scale=self.guidance_scale,
            batch_size=self.batch_size,
            seed=self.seed,
            progress=progress,
            **options,
        )
