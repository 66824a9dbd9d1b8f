"""Find layers, counts and the similarity share under a budget, on images without labels and without training."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from genprune.errors import BadCalibrationData, BudgetUnreachable, GenpruneError, UnsupportedModel
from genprune.families import denoiser
from genprune.tokens import checks
from genprune.tokens.budgets import Budgets, acting
from genprune.tokens.candidates import Candidate, changed, crossed, drawn, like
from genprune.tokens.handle import TokenHandle, prune_tokens
from genprune.tokens.hosts import TokenHost
from genprune.tokens.latency import TimeModel, Timing
from genprune.tokens.methods import TokenMethod, ZeroTPrune
from genprune.tokens.presets import TokenPreset
from genprune.tokens.proxies import DISTANCES, as_batches, distance_between, outputs
from genprune.tokens.schedule import TOLERANCE, Counts, fewest
from genprune.tokens.trials import TokenSearch, Trial
from genprune.untouched import untouched

_ELITE = 6  # candidates that new ones are made from


def search_tokens(
    target,
    images: Tensor | Iterable,
    method: TokenMethod | None = None,
    *,
    budgets: Sequence[float] | None = None,
    trials: int = 100,
    seconds: float | None = None,
    drawn_share: float = 0.4,
    distance: str = "cosine",
    most_layers: int = 8,
    least: int | None = None,
    batch_size: int = 32,
    timing: Timing | None = None,
    seed: int = 0,
    progress: bool = False,
) -> TokenSearch:
    """The layers, counts and similarity share that keep a model's output nearest to itself under a budget.

    Nothing is trained and no label is read: each trial is the forward passes of the images. The first trial is the
    method's own default under the budget, so that the result is never behind it on these images.

    Args:
        target: a model that `prune_tokens` takes, with all its tokens; it is as before afterwards.
        images: calibration images, `(count, channels, height, width)` as the model wants them, or batches of them;
            32 to 256 of the kind that the model will see.
        method: the score, what becomes of removed tokens, and the budget: `ZeroTPrune(keep=0.65)`, also with
            `of="latency"`. With `layers` the search stays among them.
        budgets: several budgets instead of the method's `keep`: a curve, each found from the one before it.
        trials: candidates to run for each budget.
        seconds: stop earlier, after so long over all budgets.
        drawn_share: of the trials that are drawn at random, as published; the others change and cross the best. 1:
            Monte Carlo alone.
        distance: `cosine` or `mse` of pooled features, or `kl` of the classes.
        most_layers: how many layers reduce at most.
        least: patches that stay to the end at least. Default: 1 where the head reads the class token alone, a quarter
            of them where it reads the patches.
        batch_size: images a call, where `images` is one tensor.
        timing: how wall time is measured for `of="latency"`.
        seed: of the search. The same seed and images give the same result, unless `seconds` or a clock cuts in.
        progress: show a bar.

    Returns:
        `TokenSearch`: `gp.prune_tokens(model, search.preset)`, `search.save("preset.json")`.

    Raises:
        BadCalibrationData: the images are no images, or what the model makes of them is not finite.
        UnsupportedModel: it is no image model of timm, or has no classes and the distance needs them.
        BudgetUnreachable: no candidate meets a budget.
        GenpruneError: a value out of range; `least` below a quarter of the patches of a model whose head reads them.

    Reference:
        Zero-TPrune searches layers, rates and similarity share by Monte Carlo. What it drew them from is not
        published, and the improvement by evolution is ours.
    """
    started = time.monotonic()
    method = ZeroTPrune() if method is None else method
    wanted = tuple(budgets) if budgets is not None else (method.keep,)
    _check(method, wanted, trials, drawn_share, distance, most_layers)
    batches = as_batches(images, batch_size)
    model = denoiser(target)
    _check_model(model, distance)
    with prune_tokens(model, method.changed(keep=1.0), timing=timing) as handle, untouched(model):
        run = _Run(handle, batches, distance, least, most_layers, random.Random(seed))
        found = []
        for budget in wanted:
            bar = _bar(progress, trials, f"keep {budget:g}")
            found.append(run.search(budget, trials, drawn_share, started, seconds, bar))
    images_run = len(run.dense)
    return TokenSearch(tuple(found), tuple(run.trials), distance, images_run, time.monotonic() - started)


def _check(method: TokenMethod, budgets: tuple, trials: int, drawn_share: float, distance: str, most: int) -> None:
    checks.check_choice("distance", distance, DISTANCES)
    checks.check_whole("trials", trials, 1)
    checks.check_whole("most_layers", most, 1)
    checks.check_share("drawn_share", drawn_share, zero=True)
    if not budgets:
        raise GenpruneError("budgets is empty; expected one share or more, such as budgets=(0.8, 0.65). Leave it out.")
    for budget in budgets:
        if not isinstance(budget, float | int) or isinstance(budget, bool) or not 0 < budget < 1:
            raise GenpruneError(
                f"the search got the budget {budget!r}; expected a share of the {method.of} between 0 and 1. Pass "
                f"{type(method).__name__}(keep=0.65), or budgets=(0.8, 0.65)."
            )


def _check_model(model: nn.Module, distance: str) -> None:
    if not hasattr(model, "forward_features"):
        raise UnsupportedModel(
            f"{type(model).__name__} makes no features of images; expected a timm model. For a denoiser pass "
            "keep={layer: share} to gp.prune_tokens."
        )
    if distance == "kl" and getattr(model, "num_classes", None) == 0:
        raise UnsupportedModel(
            f"distance='kl' compares classes, and this {type(model).__name__} has none; expected a classifier. Pass "
            "distance='cosine'."
        )


def _bar(progress: bool, total: int, text: str):
    if not progress:
        return None
    from tqdm import tqdm

    return tqdm(total=total, desc=text, unit="trial", leave=False)


def head_reads_patches(model: nn.Module) -> bool:
    """Whether the model's output is made of its patches, and not of the class token alone."""
    return getattr(model, "global_pool", "") != "token" or getattr(model, "attn_pool", None) is not None


class _Run:
    """The trials of one search on one model, whose hooks are on."""

    def __init__(
        self,
        handle: TokenHandle,
        batches: list,
        distance: str,
        least: int | None,
        most_layers: int,
        random_: random.Random,
    ):
        self.handle, self.batches, self.distance = handle, batches, distance
        self.most_layers, self.random = most_layers, random_
        self.method = handle.method
        self.host: TokenHost = handle._host
        self.budgets: Budgets = handle._budgets
        self.shares = "similarity_share" in {field.name for field in dataclasses.fields(self.method)}
        self.least = self._least(least)
        self.layers = self._layers()
        self.time: TimeModel | None = None
        self.correction = 0.0  # of the time model, from measurements
        self.trials: list[Trial] = []
        self.best: list[tuple[Candidate, Trial]] = []
        self.dense = self._outputs()
        if not self.dense.isfinite().all():
            raise BadCalibrationData(
                f"the outputs of this {type(self.host.model).__name__} on the calibration images are not finite; "
                "expected numbers. Check the images' normalisation, or run in float32."
            )

    def _least(self, least: int | None) -> int:
        patches, quarter = self.host.patches, max(1, self.host.patches // 4)
        reads = head_reads_patches(self.host.model)
        if least is None:
            return quarter if reads else 1
        checks.check_whole("least", least, 1)
        if least > patches or (reads and least < quarter):
            why = "whose output is made of its patches" if reads else "with a class token"
            low = quarter if reads else 1
            raise GenpruneError(
                f"least={least} patches are to stay in this {type(self.host.model).__name__}, {why}; expected {low} "
                f"to {patches}. Pass least={quarter}, or leave it out."
            )
        return least

    def _layers(self) -> tuple[int, ...]:
        """Where reducing saves something; not in the last layer of a model whose output is made of its patches."""
        last = len(self.host.paths) - 1
        wanted = self.host.scored if self.method.layers is None else self.method.layers
        useless = self.method.placement == "after_block" or head_reads_patches(self.host.model)
        layers = tuple(layer for layer in wanted if not (layer == last and useless))
        if not layers:
            raise GenpruneError(
                f"there is no layer to search among but the last, {last}, where reducing saves nothing or takes from "
                "the output; expected an earlier one. Pass other layers=(...), or leave them out."
            )
        return layers

    def search(self, budget: float, trials: int, drawn_share: float, started: float, seconds, bar) -> TokenPreset:
        """Run the trials of one budget; its best becomes a preset."""
        inherited, self.best = [candidate for candidate, _ in self.best[:_ELITE]], []
        if self.method.of == "latency" and self.time is None:
            self.time = self.budgets.time_model(self.method, self._timed())
        self._run_default(budget)
        random_until = 1 + round((trials - 1) * drawn_share)
        for number in range(1, trials):
            if seconds is not None and time.monotonic() - started > seconds:
                break
            if number <= len(inherited):
                self._run(inherited[number - 1], budget, "evolved")
            elif number < random_until or not self.best:
                self._try(lambda: drawn(self.layers, self.shares, self.most_layers, self.random), budget, "drawn")
            else:
                self._try(self._child, budget, "evolved")
            if bar is not None:
                bar.update()
        if bar is not None:
            bar.close()
        if not self.best:
            raise BudgetUnreachable(
                f"none of {trials} candidates keeps {budget} of the {self.method.of} with {self.least} patches or "
                f"more at the end of this {type(self.host.model).__name__}. Raise keep, most_layers or trials."
            )
        return self._preset(budget)

    def _child(self) -> Candidate:
        parents = [candidate for candidate, _ in self.best[:_ELITE]]
        if len(parents) > 1 and self.random.random() < 0.3:
            parent = crossed(*self.random.sample(parents, 2), self.random)
            weights = dict(sorted(parent.weights.items())[: self.most_layers])
            return Candidate(weights, parent.similarity_share)
        child = changed(self.random.choice(parents), self.layers, self.random)
        return child if len(child.weights) <= self.most_layers else self.random.choice(parents)

    def _try(self, make, budget: float, kind: str) -> None:
        """One trial of the first of some candidates that meets the budget and was not run."""
        for _ in range(50):
            if self._run(make(), budget, kind):
                return

    def _run(self, candidate: Candidate, budget: float, kind: str) -> bool:
        """Whether it was run: it meets the budget, and is new."""
        try:
            counts = candidate.counts(
                budget,
                self._share_of(candidate),
                self.host.patches,
                self.least,
                self.what,
                lambda patches: fewest(self.method, patches),
            )
        except BudgetUnreachable:
            return False
        return self._measure(candidate, counts, budget, kind)

    def _measure(self, candidate: Candidate, counts: Counts, budget: float, kind: str) -> bool:
        share = None if candidate.similarity_share is None else round(candidate.similarity_share, 2)
        if any(one.counts == counts and one.similarity_share == share for one in self.trials):
            return False
        method = self._method(candidate)
        self.handle.set(keep=dict(counts), **({} if share is None else {"similarity_share": share}))
        distance = distance_between(self.dense, self._outputs(), self.distance)
        keep = self.budgets.share(counts, method)
        cost = keep if self.method.of == "macs" else self._time_of(keep, counts)
        trial = Trial(budget, kind, dict(counts), share, keep, cost, distance)
        self.trials.append(trial)
        self.best.append((candidate, trial))
        self.best.sort(key=lambda pair: pair[1].distance)
        return True

    @property
    def what(self) -> str:
        return "MACs" if self.method.of == "macs" else "the measured time"

    def _method(self, candidate: Candidate) -> TokenMethod:
        if candidate.similarity_share is None:
            return self.method
        return self.method.changed(similarity_share=round(candidate.similarity_share, 2))

    def _share_of(self, candidate: Candidate):
        method = self._method(candidate)
        if self.method.of == "macs":
            return lambda counts: self.budgets.rough_share(counts, method)
        return lambda counts: self._time_of(self.budgets.rough_share(counts, method), counts)

    def _time_of(self, macs: float, counts: Counts) -> float:
        return self.time.share(macs, acting(counts, self.host)) + self.correction

    def _run_default(self, budget: float) -> None:
        """The method's own layers and rule under the budget, where they keep what has to stay."""
        try:
            counts = self.budgets.plan(self.method.changed(keep=budget, of="macs")).counts
        except BudgetUnreachable:
            return
        if not set(counts) <= set(self.layers):
            counts = {layer: count for layer, count in counts.items() if layer in self.layers}
        candidate = like(counts, self.host.patches, getattr(self.method, "similarity_share", None))
        exact = self.method.of == "macs" and self.budgets.share(counts, self.method) <= budget + TOLERANCE
        if counts and min(counts.values()) >= self.least and exact:
            self._measure(candidate, counts, budget, "default")
        elif counts:
            self._run(candidate, budget, "default")

    def _timed(self) -> dict[str, Counts]:
        """Counts to measure time at: few and many layers, at different costs."""
        schedules = {}
        few, half = self.layers[:: max(1, len(self.layers) // 2)][:2], self.layers[: max(1, len(self.layers) // 2)]
        for name, layers in (("few", few), ("half", half[:1]), ("many", self.layers)):
            for part in (0.8, 0.5):
                rate = part ** (1 / len(layers))
                now, counts = self.host.patches, {}
                for layer in layers:
                    now = max(fewest(self.method, now), int(now * rate))
                    counts[layer] = now
                schedules[f"{name} {part}"] = counts
        return schedules

    def _outputs(self) -> Tensor:
        with torch.inference_mode():
            return outputs(self.host.model, self.batches, self.distance)

    def _preset(self, budget: float) -> TokenPreset:
        """The best as a preset; for a budget of time measured, and corrected where it misses."""
        measured = None
        if self.method.of == "latency":
            for _ in range(3):
                candidate, trial = self.best[0]
                measured = self.budgets.measure(trial.counts, self._method(candidate))
                if abs(measured.share - budget) <= 0.02:
                    break
                self.correction += measured.share - self._time_of(trial.keep, trial.counts)
                if not self._run(candidate, budget, "evolved"):
                    break
                self.best = [pair for pair in self.best if pair[1] is not trial]
                self.best.sort(key=lambda pair: pair[1] is not self.trials[-1])  # the corrected one first
        candidate, trial = self.best[0]
        figures = {"budget": budget, "keep": trial.keep, f"{self.distance}_distance": trial.distance}
        if measured is not None:
            figures |= {"latency": measured.share, "latency_batch_size": measured.batch_size}
        method = self._method(candidate).changed(keep=dict(trial.counts), of="macs", layers=None)
        depth, name = len(self.host.paths), type(self.host.model).__name__
        return TokenPreset(method, self.host.patches, depth, name, figures, "search")
