"""One router training in progress: the loss of a step, its gradient, and the step itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from genprune.costs import SiteCosts
from genprune.errors import GenpruneError
from genprune.interrupts import interrupt_deferred
from genprune.recovery.draws import sample_indices
from genprune.recovery.taps import FeatureTaps
from genprune.routers import assignment, relaxation
from genprune.routers.architecture import ArchitectureSpace
from genprune.routers.losses import commitment_loss, contrastive_loss, resource_loss, spread_terms
from genprune.routers.predictor import ArchitecturePredictor
from genprune.routers.resources import CodeCosts
from genprune.routers.row_gates import RowGates
from genprune.routers.settings import APTP
from genprune.routers.training_setup import budget_quantity

_PRIME = 1_000_003


class RouterModel(nn.Module):
    """Predictor and codes in one module, whose output holds all that the loss reads (data parallelism sees it).

    Args:
        predictor: embeddings `(n, dim)` -> logits `(n, D)`; None where noise levels choose.
        codes: logits `(K, D)` to begin with.
    """

    def __init__(self, predictor: ArchitecturePredictor | None, codes: Tensor) -> None:
        super().__init__()
        self.predictor, self.codes = predictor, nn.Parameter(codes.clone())

    def forward(self, embeddings: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Predicted logits `(n, D)`, or None, and the codes `(K, D)`."""
        return None if self.predictor is None else self.predictor(embeddings), self.codes * 1


class RouterTraining:
    """Denoiser, data, codes and optimiser of one training.

    Args:
        denoiser: frozen, on the accelerator's device; gates go on while a step runs.
        taps: module paths of the blocks whose features are compared.
        data: `PipelineData`.
        embeddings: of its distinct prompts, shape `(prompts, dim)`, or None.
        boundaries: between noise levels, where those choose.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        taps: list[str],
        data: Any,
        embeddings: Tensor | None,
        model: RouterModel,
        space: ArchitectureSpace,
        costs: SiteCosts,
        settings: APTP,
        boundaries: tuple[float, ...],
        accelerator: Any,
    ) -> None:
        self.denoiser, self.data, self.embeddings, self.space = denoiser, data, embeddings, space
        self.settings, self.boundaries, self.accelerator = settings, boundaries, accelerator
        self.costs = CodeCosts(costs, space, budget_quantity(settings))
        # against the dense model every time, so that a run that goes on aims at what it aimed at before
        self.target = self.costs.prunable_target(settings.keep)
        self.model = model
        groups = [{"params": [model.codes], "rate": settings.learning_rate}]
        if model.predictor is not None:
            rate = settings.predictor_learning_rate or settings.learning_rate / model.predictor.linear.in_features
            groups.append({"params": list(model.predictor.parameters()), "rate": rate})
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        predictor = [] if model.predictor is None else list(model.predictor.parameters())
        self._parts = [part for part in ([model.codes], predictor) if part]
        self.gates = RowGates(denoiser, costs.sites)
        self.taps = FeatureTaps(denoiser, taps)
        self.step_done = 0

    def __enter__(self) -> RouterTraining:
        self.gates.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.gates.__exit__(*error)
        self.taps.remove()

    def step(self) -> dict[str, Any]:
        """One optimiser step; what the curve says of it. Raises `GenpruneError` where a term is not finite."""
        step, settings = self.step_done, self.settings
        if step == settings.warmup_steps and settings.experts > 1 and self.embeddings is not None:
            self.begin_codes()
        for group in self.optimizer.param_groups:
            group["lr"] = settings.warmed(group["rate"], step)
        loss, record = self._loss(step)
        if wrong := [name for name, value in record["terms"].items() if not torch.isfinite(torch.tensor(value))]:
            raise GenpruneError(
                f"the term '{wrong[0]}' of step {step + 1} is {record['terms'][wrong[0]]}; expected a finite one. "
                "Lower learning_rate, or run the model in bfloat16 or float32 instead of float16."
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        for part in self._idle(step):
            part.grad = None  # zeros that moments shall not count
        # apart: the contrastive term moves the predictor far more than any term moves the codes
        record["gradient_norms"] = [
            float(self.accelerator.clip_grad_norm_(part, settings.max_grad_norm)) for part in self._parts
        ]
        with interrupt_deferred():  # a Ctrl-C leaves a whole step behind, or none of it
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step_done = step + 1
        return record

    @torch.no_grad()
    def begin_codes(self) -> None:
        """At the end of the warm-up: each code begins in the midst of predictions that lie near each other."""
        logits = self.model.predictor(self.embeddings.to(self.accelerator.device))
        self.model.codes.copy_(assignment.cluster_codes(self.space, logits, len(self.model.codes)))

    def indices(self, step: int) -> range:
        """Global sample indices of this process's rows."""
        accelerator = self.accelerator
        return sample_indices(
            step, 0, 1, self.settings.batch_size, accelerator.process_index, accelerator.num_processes
        )

    def _loss(self, step: int) -> tuple[Tensor, dict[str, Any]]:
        settings, space, indices = self.settings, self.space, self.indices(step)
        rows = self.data.rows(indices).to(self.accelerator.device)
        embeddings = None
        if self.embeddings is not None:
            embeddings = self.embeddings[self.data.prompt_indices(indices)].to(self.accelerator.device)
        predicted, codes = self.wrapped(embeddings)
        chosen, own = self._chosen(step, indices, predicted, codes)
        logits = codes if chosen is not None else predicted
        gates = space.gates(logits, self._noise(step, logits, shared=chosen is not None))
        kept = self._prunable(self.costs.share(gates))
        place = torch.arange(rows.rows, device=kept.device) if chosen is None else chosen
        terms = self._denoiser_terms(rows, gates, place)
        terms["resource"] = resource_loss(self._gathered(kept[place]), self.target, settings.resource_loss)
        if chosen is not None and settings.experts > 1:
            terms["spread"], terms["largest"] = spread_terms(kept)
        if predicted is not None and settings.experts > 1:
            features = space.features(predicted)
            everyone = self._gathered(features), self.accelerator.gather(self._standardised(embeddings))
            terms["contrastive"] = contrastive_loss(*everyone, settings.contrastive_temperature)
            if settings.commitment_weight and chosen is not None:
                terms["commitment"] = commitment_loss(features, space.features(codes)[chosen])
        loss = sum(getattr(settings, f"{name}_weight") * value.float() for name, value in terms.items())
        # data parallelism waits for a gradient of every parameter, also of those that this step does not move
        loss = loss + 0 * sum(values.sum() for values in (predicted, codes) if values is not None)
        return loss, self._record(step, loss, terms, kept, place, chosen, own, codes)

    def _chosen(
        self, step: int, indices: range, predicted: Tensor | None, codes: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The code of each row, None in the warm-up; and similarities, where there are some."""
        settings, device = self.settings, self.accelerator.device
        if settings.route_by == "timestep":
            levels = self.data.noise_levels(indices)
            return assignment.by_noise_level(levels, self.boundaries).to(device), None
        if settings.experts == 1:
            return torch.zeros(len(indices), dtype=torch.long, device=device), None
        if step < settings.warmup_steps:
            return None, None
        return assignment.balanced(self.space, predicted, codes, settings, self.accelerator)

    def _idle(self, step: int) -> list[nn.Parameter]:
        """Parameters that a step does not move: codes in the warm-up, the predictor where there is one code."""
        if self.settings.experts == 1 and self.model.predictor is not None:
            return list(self.model.predictor.parameters())
        return [self.model.codes] if step < self.settings.warmup_steps else []

    def _noise(self, step: int, logits: Tensor, shared: bool) -> Tensor:
        """Gumbel draws; those of a code are the same for all its rows and on all processes, of a row its own."""
        count, length = logits.shape
        seed = ((self.settings.seed * _PRIME + step) * _PRIME + (not shared)) % 2**63
        generator, processes = torch.Generator().manual_seed(seed), 1 if shared else self.accelerator.num_processes
        everyone = relaxation.gumbel((processes * count, length), generator)  # as one process would draw them
        first = 0 if shared else self.accelerator.process_index * count
        return everyone[first : first + count].to(logits.device)

    def _prunable(self, share: Tensor) -> Tensor:
        """r: of what can go, the share that stays."""
        return (share - self.costs.least) / (1 - self.costs.least)

    def _standardised(self, embeddings: Tensor) -> Tensor:
        return self.model.predictor.standardised(embeddings)

    def _gathered(self, values: Tensor) -> Tensor:
        """The rows of all processes, this one's with their gradient."""
        if self.accelerator.num_processes == 1:
            return values
        everyone = self.accelerator.gather(values.detach())
        first = self.accelerator.process_index * len(values)
        # data parallelism averages gradients: times the processes, so that each row counts as in one large batch
        own = values.detach() + (values - values.detach()) * self.accelerator.num_processes
        return torch.cat([everyone[:first], own, everyone[first + len(values) :]])

    def _denoiser_terms(self, rows: Any, gates: dict[str, Tensor], place: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            self.gates.open()
            answer, theirs = self._called(rows)
        self.gates.set(gates, place)  # until the next step: gradient checkpointing runs blocks once more
        prediction, ours = self._called(rows)
        blocks = [_relative_error(one, other) for one, other in zip(_flat(ours), _flat(theirs))]
        return {
            "denoising": rows.task_loss(prediction),
            "output": rows.output_loss(prediction, answer),
            "block": torch.stack(blocks).mean() if blocks else prediction.sum() * 0,
        }

    def _called(self, rows: Any) -> tuple[Tensor, list]:
        self.taps.open()
        try:
            with self.accelerator.autocast():
                prediction = rows.predict(self.denoiser)
        finally:
            features = self.taps.close()
        return prediction, features

    def _record(
        self,
        step: int,
        loss: Tensor,
        terms: dict[str, Tensor],
        kept: Tensor,
        place: Tensor,
        chosen: Tensor | None,
        own: Tensor | None,
        codes: Tensor,
    ) -> dict[str, Any]:
        """The numbers of a step; `gap` is how far the drawn architectures are from those without noise."""
        margin = torch.zeros(())
        if own is not None and own.shape[1] > 1:
            best = own.topk(2, dim=1).values
            margin = (best[:, 0] - best[:, 1]).mean()
        told = [loss, kept[place].mean(), margin, *terms.values()]
        told = torch.stack([value.detach().double().to(loss.device) for value in told])
        told = self.accelerator.reduce(told, "mean").tolist()  # every process has rows of its own
        record = {"step": step + 1, "loss": told[0], "terms": dict(zip(terms, told[3:])), "kept": told[1]}
        if chosen is not None:
            with torch.no_grad():
                fixed = self._prunable(self.costs.share(self.space.gates(codes)))
            record["codes"] = [round(value, 5) for value in fixed.tolist()]
            record["gap"] = float((kept.detach() - fixed).abs().mean())
            counts = torch.bincount(self.accelerator.gather(chosen), minlength=len(codes))
            record["rows"] = counts.tolist()
        if own is not None and own.shape[1] > 1:
            record["margin"] = told[2]
        return record


def _flat(features: list) -> list[Tensor]:
    return [each for caught in features for each in caught]


def _relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """mean |f^T - f^S|^2 / mean |f^T|^2."""
    ours, theirs = ours.float(), theirs.float()
    return (ours - theirs).square().mean() / theirs.square().mean().clamp_min(1e-12)
