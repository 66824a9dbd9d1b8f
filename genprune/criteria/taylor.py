"""First-order Taylor importance of gates, timestep by timestep."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from genprune.errors import BadCalibrationData
from genprune.gates import attach_gates
from genprune.sites import Sites


@dataclass(frozen=True)
class TaylorScores:
    """How much the loss would change, to first order, if a unit's gate went from 1 to 0.

        S_u = sum_t w_t mean_i | dL_i,t / dg_u * g_u |   at g = 1, sum_t w_t = 1,

    over calibration rows i and timesteps t: one backward pass a batch gives every unit of every row, and only gates
    get gradients. The absolute value is taken per row, so that rows of opposite sign do not cancel.

    Args:
        weights: `w_t` for the timesteps in ascending order; None: uniform. Scaled to sum to 1.
        threshold: timesteps whose mean loss is under this share of the largest timestep's are left out (Diff-Pruning:
            0.05 for pixel-space, 0.1 for latent models). 0 keeps all.

    Reference:
        Molchanov et al., arXiv 1906.10771, eq. 7-8, for gates; Diff-Pruning (Fang et al., arXiv 2305.10924), whose
        rule drops timesteps that hardly carry loss.
    """

    weights: tuple[float, ...] | None = None
    threshold: float = 0.0

    name: ClassVar[str] = "taylor"
    needs: ClassVar[tuple[str, ...]] = ("weights", "gradients")
    additive: ClassVar[bool] = True
    summary: ClassVar[str] = "first-order change of the denoising loss, per timestep; needs prompts or data"

    def scores(self, model: nn.Module, sites: Sites, calibration: Iterable) -> dict[str, Tensor]:
        """Site name -> scores of shape `(size,)`, float32.

        Args:
            calibration: batches with `rows`, `timestep` and `losses(model) -> (rows,)`. Read once; memory does not
                grow with their number.
        """
        totals: dict[float, _Total] = {}
        for batch in calibration:
            gradients, loss = gate_gradients(model, sites, batch)
            totals.setdefault(batch.timestep, _Total(sites)).add(gradients, loss, batch.rows)
        if not totals:
            raise BadCalibrationData("no calibration batch; expected at least one. Pass prompts or data.")
        shares = self._weights({t: total.loss / total.rows for t, total in totals.items()})
        return {
            name: sum(shares[t] * total.sums[name] / total.rows for t, total in totals.items() if shares[t] > 0)
            for name in sites
        }

    def _weights(self, losses: dict[float, float]) -> dict[float, float]:
        """Timestep -> its weight, from mean losses."""
        ordered = sorted(losses)
        given = self.weights or (1.0,) * len(ordered)
        if len(given) != len(ordered):
            raise BadCalibrationData(
                f"{len(given)} weights for {len(ordered)} timesteps; expected one for each, in ascending order."
            )
        floor = self.threshold * max(losses.values())
        kept = {t: weight if losses[t] >= floor or self.threshold == 0 else 0.0 for t, weight in zip(ordered, given)}
        total = sum(kept.values())
        if not total > 0:
            raise BadCalibrationData(
                f"no timestep has weight: losses {losses}, threshold {self.threshold}, weights {given}. "
                "Lower the threshold, or give some timestep a weight above 0."
            )
        return {t: weight / total for t, weight in kept.items()}


class _Total:
    """Sums over the rows of one timestep."""

    def __init__(self, sites: Sites) -> None:
        self.sums = {name: torch.zeros(site.size) for name, site in sites.items()}
        self.loss, self.rows = 0.0, 0

    def add(self, gradients: dict[str, Tensor], loss: float, rows: int) -> None:
        for name, gradient in gradients.items():
            self.sums[name] += gradient.abs().sum(0).cpu()
        self.loss, self.rows = self.loss + loss, self.rows + rows


def gate_gradients(model: nn.Module, sites: Sites, batch) -> tuple[dict[str, Tensor], float]:
    """`dL/dg` at g = 1 for every unit and row: site name -> `(rows, size)`, float32; and the summed loss.

    The model's parameters should not require gradients: then only gates get any.
    """
    device = next(model.parameters()).device
    gates = {
        name: torch.ones(batch.rows, site.size, device=device, requires_grad=True) for name, site in sites.items()
    }
    with torch.inference_mode(False), torch.enable_grad(), attach_gates(model, gates, sites):
        loss = batch.losses(model).sum()
        found = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(gate) if gradient is None else gradient.detach()
        for (name, gate), gradient in zip(gates.items(), found)
    }
    return gradients, float(loss.detach())
