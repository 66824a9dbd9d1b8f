"""What the output loses when one candidate is applied: one pass over recorded calls, prefixes computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genprune.denoising.activations import shown
from genprune.denoising.replay import ModelCall
from genprune.errors import BadCalibrationData, GenpruneError
from genprune.layers.candidates import Candidate, applied, outermost, stand_ins
from genprune.layers.distances import Distance
from genprune.layers.prefix import changed_outputs
from genprune.sites import Sites


class OutputLoss:
    """Distances between a model's outputs with and without layers, over fixed calls: the same for every candidate.

    Args:
        model: in evaluation mode.
        sites: of the model.
        calls: what it is called with; `weight` is that of a call.
        distance: one of `DISTANCES`, a function of two tensors.
        progress: show a bar.
    """

    def __init__(
        self, model: nn.Module, sites: Sites, calls: Sequence[ModelCall], distance: Distance, progress: bool = False
    ):
        if any(call.loss_fn is not None for call in calls):
            raise BadCalibrationData(
                "a loss_fn hides what the model returns, which layers are judged by; expected batches of its inputs. "
                "Pass data=[inputs, ...] without loss_fn."
            )
        self.model, self.sites, self.calls, self.distance = model, sites, calls, distance
        self.progress = progress
        self._dense: list[Tensor] | None = None

    @torch.no_grad()
    def dense(self) -> list[Tensor]:
        """The unchanged model's output of each call, float32 or wider, on the CPU; computed once."""
        if self._dense is None:
            self._dense = [self._output(call) for call in shown(self.calls, "dense outputs", self.progress)]
        return self._dense

    def _output(self, call: ModelCall) -> Tensor:
        return _wide(next(changed_outputs(self.model, self._inputs(call), {}))[1])

    def _inputs(self, call: ModelCall) -> Any:
        return call.on(next(self.model.parameters()).device)

    @torch.no_grad()
    def alone(
        self, candidates: Sequence[Candidate], base: Sequence[Candidate] = (), what: str = "scoring layers"
    ) -> dict[str, float]:
        """The mean distance to the dense output under each candidate alone, on top of those in `base`.

        Args:
            candidates: changes of whole modules, or of some units of a site (then nothing is computed only once).
            base: candidates that are in force all the time.
            what: shown beside the bar.

        Returns:
            Candidate's name -> weighted mean over all rows of all calls.

        Raises:
            GenpruneError: an output is not finite.
        """
        under = _modules(self.model, self.sites, base)
        whole = {c.name: stand_ins(self.model, self.sites, c) for c in candidates if not _gated(c)}
        gated = [c for c in candidates if _gated(c)]
        sums = dict.fromkeys((c.name for c in candidates), 0.0)
        references = self.dense() if base or self._dense is not None else None
        found: list[Tensor] = []
        total = 0.0
        for index, call in enumerate(shown(self.calls, what, self.progress)):
            inputs = self._inputs(call)
            outputs = changed_outputs(self.model, inputs, whole, base=under)
            unchanged = _wide(next(outputs)[1])
            dense = unchanged if references is None else references[index]
            found.append(dense)
            weight = _weight(call, dense)
            total += weight
            for name, output in outputs:
                sums[name] += weight * self._mean(output, dense, name)
            for candidate in gated:
                with applied(self.model, self.sites, [*base, candidate]):
                    output = next(changed_outputs(self.model, inputs, {}))[1]
                sums[candidate.name] += weight * self._mean(output, dense, candidate.name)
        self._dense = found if references is None else references
        return {name: value / total for name, value in sums.items()}

    @torch.no_grad()
    def joint(self, candidates: Sequence[Candidate]) -> float:
        """The mean distance to the dense output with all of these applied at once."""
        dense, lost, total = self.dense(), 0.0, 0.0
        with applied(self.model, self.sites, candidates):
            for call, reference in zip(self.calls, dense):
                output = next(changed_outputs(self.model, self._inputs(call), {}))[1]
                lost += _weight(call, reference) * self._mean(output, reference, "the joint change")
                total += _weight(call, reference)
        return lost / total

    def _mean(self, output: Tensor, dense: Tensor, name: str) -> float:
        value = float(self.distance(_wide(output), dense).double().mean())
        if value != value or value in (float("inf"), float("-inf")):
            raise GenpruneError(
                f"the output under '{name}' is not finite; expected numbers. Score in float32 or bfloat16, and check "
                "that the calibration inputs are finite."
            )
        return value


def _weight(call: ModelCall, output: Tensor) -> float:
    """Of all rows of a call together: the last batch may be a smaller one."""
    return call.weight * output.shape[0]


def _gated(candidate: Candidate) -> bool:
    return any(bool(mask.any()) for mask in candidate.keep.values())


def _modules(model: nn.Module, sites: Sites, candidates: Sequence[Candidate]) -> Mapping[str, nn.Module]:
    modules: dict[str, nn.Module] = {}
    for candidate in candidates:
        modules |= stand_ins(model, sites, candidate)
    return outermost(modules)


def _wide(output: Tensor) -> Tensor:
    output = output.detach().cpu()
    return output.float() if output.dtype.itemsize < 4 else output
