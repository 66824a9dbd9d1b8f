"""One recovery in progress: the loss of a step, its gradient, and the step itself."""

from __future__ import annotations

import contextlib
import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from genprune.errors import GenpruneError, PlanMismatch
from genprune.interrupts import interrupt_deferred
from genprune.recovery.averages import AveragedWeights
from genprune.recovery.checkpoints import TrainingState
from genprune.recovery.distillation import NormalizedDistillation
from genprune.recovery.divergence import DivergenceGuard, first_not_finite
from genprune.recovery.draws import sample_indices
from genprune.recovery.normalizers import DISTANCES, RunningScales, mean_square, raw_distance
from genprune.recovery.rows import Rows
from genprune.recovery.taps import FeatureTaps, TappedModel


class RecoveryFailed(GenpruneError):
    """A term or gradient is not finite, or the loss diverges.

    Args:
        step: number of the step that failed, from 0.
        since: the first step, from 0, whose loss was already bad.
    """

    def __init__(self, message: str, step: int, since: int) -> None:
        super().__init__(message)
        self.step, self.since = step, since


@dataclass(frozen=True)
class StepValues:
    """The numbers of one step: means over its rows, micro-batches and processes.

    Args:
        distances, raws: by term: on the normaliser's scale before a_l, and the plain mean squared error.
        energies: `mean |f^T|^2` of each tap.
    """

    distances: list[float]
    raws: list[float]
    energies: list[float] = field(repr=False)


class RecoveryTraining:
    """Student, teacher, optimiser and data of one recovery.

    Args:
        student, teacher: bare models on the accelerator's device; the teacher frozen.
        pairs: of features; empty without a feature term.
        trained: name -> parameter of the student.
        data: `rows(indices)` gives rows.
        accelerator: of the run.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairs: list[tuple[str, str]],
        trained: dict[str, nn.Parameter],
        data: Any,
        settings: NormalizedDistillation,
        accelerator: Any,
    ) -> None:
        self.pairs, self.data, self.settings, self.accelerator = pairs, data, settings, accelerator
        self.teacher = teacher
        self.teacher_taps = FeatureTaps(teacher, [theirs for _, theirs in pairs])
        try:
            self.features = self._feature_names()
            self.terms = ("task", "output", *self.features)
            learned = len(self.terms) if settings.learned_weights else 0
            self.tapped = TappedModel(student, [ours for ours, _ in pairs], learned)
        except BaseException:
            self.teacher_taps.remove()
            raise
        groups = [{"params": list(trained.values()), "weight_decay": settings.weight_decay}]
        parameters = dict(trained)
        if self.tapped.log_variances is not None:
            parameters["log_variances"] = self.tapped.log_variances
            groups.append({"params": [self.tapped.log_variances], "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas)
        self.wrapped, self.optimizer = accelerator.prepare(self.tapped, optimizer)
        self.state = TrainingState(
            parameters,
            optimizer,
            RunningScales(settings.normalizer),
            DivergenceGuard(settings.divergence_factor, settings.divergence_patience),
            None if settings.ema_decay is None else AveragedWeights(parameters, settings.ema_decay),
            accelerator.scaler,
        )

    def remove(self) -> None:
        """Take every hook off both models."""
        self.teacher_taps.remove()
        self.tapped.taps.remove()

    def _feature_names(self) -> tuple[str, ...]:
        """The student's path of every feature; `path[0]`, `path[1]` for the streams of a joint block."""
        if not self.pairs:
            return ()
        names = []
        for (ours, _), caught in zip(self.pairs, self._teacher(self._rows(0, 0))[1]):
            names += [ours] if len(caught) == 1 else [f"{ours}[{index}]" for index in range(len(caught))]
        return tuple(names)

    def base_weights(self) -> list[float]:
        """The weight of each term: the settings' by a_l."""
        settings, taps = self.settings, len(self.features)
        share = settings.feature_weight / (taps if settings.feature_reduction == "mean" else 1) if taps else 0.0
        features = [share * scale for scale in self.state.scales.weights(taps)]
        return [settings.task_weight, settings.output_weight, *features]

    def look_at_teacher(self) -> None:
        """Take the taps' energies on the rows of the first step, which its weights need."""
        if not self.pairs or not self.state.scales.needed:
            return
        total = 0.0
        for micro_batch in range(self.settings.gradient_accumulation):
            _, features = self._teacher(self._rows(0, micro_batch))
            total = total + torch.stack([mean_square(each) for each in _single(features)])
        energies = self.accelerator.reduce(total / self.settings.gradient_accumulation, "mean")
        self.state.scales.update(energies.tolist())

    def step(self) -> dict[str, Any]:
        """One optimiser step; what the curve says of it.

        Raises:
            RecoveryFailed: before anything has changed.
        """
        step, settings = self.state.step, self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step)
        base = self.base_weights()
        self.optimizer.zero_grad()
        total = 0.0
        for micro_batch in range(settings.gradient_accumulation):
            last = micro_batch == settings.gradient_accumulation - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                loss, values = self._loss(self._rows(step, micro_batch), base)
                self.accelerator.backward(loss / settings.gradient_accumulation)
            total = total + values / settings.gradient_accumulation
        values = self._split(self.accelerator.reduce(total, "mean").tolist())
        learned = self._log_variances()
        record = self._record(step, values, base, learned)
        guard = self._checked_guard(step, record, sum(w * value for w, value in zip(base, values.distances) if w))
        record["gradient_norm"] = self._clipped_norm(step)
        with interrupt_deferred():  # a Ctrl-C leaves a whole step behind, or none of it
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.state.guard = guard
            if self.state.average is not None:
                self.state.average.update(step)
            if self.state.scales.needed and self.pairs:
                self.state.scales.update(values.energies)
            self.state.step = step + 1
        return record

    def _rows(self, step: int, micro_batch: int) -> Rows:
        accelerator, settings = self.accelerator, self.settings
        indices = sample_indices(
            step,
            micro_batch,
            settings.gradient_accumulation,
            settings.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
        )
        return self.data.rows(indices).to(accelerator.device)

    @torch.no_grad()
    def _teacher(self, rows: Rows) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        self.teacher_taps.open()
        try:
            with self.accelerator.autocast():
                prediction = rows.predict(self.teacher)
        finally:
            features = self.teacher_taps.close()
        return prediction, features

    def _loss(self, rows: Rows, base: list[float]) -> tuple[Tensor, Tensor]:
        """The loss of a micro-batch, and distances, raw errors and energies in one vector."""
        answer, theirs = self._teacher(rows)
        prediction, ours, log_variances = self.wrapped(rows)
        if prediction.shape != answer.shape:
            raise PlanMismatch(
                f"the student's output has shape {tuple(prediction.shape)}, the teacher's {tuple(answer.shape)}; "
                "expected the same. Pass the dense model that the student was cut from as teacher."
            )
        self._check_features(ours, theirs)
        ours, theirs = _single(ours), _single(theirs)
        distance = DISTANCES.get(self.settings.normalizer, raw_distance)
        features = [distance(one, other) for one, other in zip(ours, theirs)]
        distances = torch.stack([rows.task_loss(prediction), rows.output_loss(prediction, answer), *features])
        contributions = distances * torch.tensor(base, device=distances.device, dtype=distances.dtype)
        used = torch.tensor([weight > 0 for weight in base], device=distances.device)
        contributions = torch.where(used, contributions, 0)  # 0 * inf of a term that does not count
        if log_variances is None:
            loss = contributions.sum()
        else:
            loss = (torch.exp(-log_variances) * contributions + torch.where(used, log_variances, 0)).sum()
        with torch.no_grad():
            raws = [*distances[:2], *map(raw_distance, ours, theirs)]
            energies = [mean_square(each) for each in theirs]
            values = torch.cat([distances.detach(), torch.stack([*raws, *energies]).to(distances.dtype)])
        return loss, values

    def _check_features(self, ours: Any, theirs: Any) -> None:
        for (path, other), one, two in zip(self.pairs, ours, theirs):
            shapes = [[tuple(each.shape) for each in side] for side in (one, two)]
            if shapes[0] != shapes[1] or not shapes[0]:
                raise PlanMismatch(
                    f"the features of '{path}' (student) have shapes {shapes[0]}, those of '{other}' (teacher) "
                    f"{shapes[1]}; expected the same, and at least one tensor. Pass pairs=(...) without this pair, or "
                    "with modules of the same output."
                )

    def _split(self, values: list[float]) -> StepValues:
        terms = len(self.terms)
        return StepValues(values[:terms], values[terms : 2 * terms], values[2 * terms :])

    def _log_variances(self) -> list[float]:
        log_variances = self.tapped.log_variances
        return [0.0] * len(self.terms) if log_variances is None else log_variances.detach().tolist()

    def _record(self, step: int, values: StepValues, base: list[float], learned: list[float]) -> dict[str, Any]:
        """Every term, raw and weighted. For `layernorm` and `masked` the distance is not the raw error."""
        terms, loss = {}, 0.0
        for name, distance, raw, weight, log_variance in zip(self.terms, values.distances, values.raws, base, learned):
            factor = weight * math.exp(-log_variance)
            weighted = factor * distance if weight else 0.0
            loss += weighted + (log_variance if weight else 0.0)
            terms[name] = {"raw": raw, "weight": factor, "weighted": weighted}
        rate = self.settings.learning_rate_at(step)
        return {"step": step + 1, "loss": loss, "learning_rate": rate, "terms": terms}

    def _checked_guard(self, step: int, record: dict[str, Any], plain_loss: float) -> DivergenceGuard:
        """The guard after this step's loss. Raises `RecoveryFailed`."""
        weighted = {name: term["weighted"] for name, term in record["terms"].items()}
        before = self.state.guard
        if (name := first_not_finite(weighted)) is not None:
            raise RecoveryFailed(
                f"the term '{name}' of step {step + 1} is {weighted[name]}", step, step - before.above
            )
        guard, median = copy.deepcopy(before), before.median()
        if guard.diverged(plain_loss):
            worst = max(weighted, key=lambda name: weighted[name])
            raise RecoveryFailed(
                f"the loss of step {step + 1} is {plain_loss:.4g}, for {guard.above} steps above {guard.factor:g} "
                f"times its running median {median:.4g}; the largest term is '{worst}'",
                step,
                step - guard.above + 1,
            )
        return guard

    def _clipped_norm(self, step: int) -> float:
        """Clip the gradient; its norm before that. Under float16 the scaler deals with overflows."""
        norm = self.accelerator.clip_grad_norm_(list(self.state.parameters.values()), self.settings.max_grad_norm)
        norm = float(norm)
        if self.state.scaler is None and first_not_finite({"": norm}) is not None:
            names = (
                name
                for name, parameter in self.state.parameters.items()
                if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
            )
            raise RecoveryFailed(
                f"the gradient of '{next(names, 'all parameters together')}' in step {step + 1} is not finite",
                step,
                step - self.state.guard.above,
            )
        return norm


def _single(features: Any) -> list[tuple[Tensor]]:
    """Every stream of every tap as a feature of its own: text and image of a joint block differ in scale too."""
    return [(each,) for caught in features for each in caught]
