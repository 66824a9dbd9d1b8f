"""Second-order scores: what a layer's output loses when a unit goes and the others take over as well as they can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from genprune.denoising.activations import Moments, consumers, input_moments, taps, weight_matrix
from genprune.denoising.replay import ModelCall
from genprune.errors import BadCalibrationData, GenpruneError, nearest
from genprune.sites import Sites

FORMS = ("group", "columns")
FUSIONS = ("sum", "rank")
RANK_CONSTANT = 60  # of reciprocal rank fusion


@dataclass(frozen=True)
class OBSScores:
    """Rise of the mean squared output error of the layer that reads a unit, after the best refit of the others.

    With the consumer's weight `W (out, features)`, `H = 2 sum_t a_t E[x x^T] + damping * mean(diag H) I` of its input
    over whole trajectories (about the mean, see `centre`), and `S` the features of unit u:

        group:    S_u = 1/2 tr( W_S ([H^-1]_SS)^-1 W_S^T )            the exact rise, cross terms in the unit included
        columns:  S_u = 1/2 sum_{k in S} ||W_:,k||^2 / [H^-1]_kk      as OBS-Diff has it for heads

    which agree for neurons (one column each). A unit with several consumers, a head of a joint attention, sums them.

    Args:
        form: `group` or `columns`.
        fuse: `sum`, or `rank`: the order of a joint attention's heads is that of `sum_streams 1 / (60 + rank)`, and
            the sorted sums are dealt out in that order, so that other sites still compare.
        relative: divide by the mean squared output of the consumer. Off, errors compare as what they are in the
            residual stream, which layers share.
        centre: measure about the mean of x where the consumer has a bias, for a refit that changes it as well.
        damping: share of the mean diagonal of H that is added to it.
        modules_per_pass: layers measured in one pass over the calls; None: as many as fit in 4 GB.

    Reference:
        OBS-Diff (arXiv 2510.06751), from Optimal Brain Surgeon (Hassibi and Stork, 1993); group form as in ZipLM
        (Kurtic et al., arXiv 2302.04089).
    """

    form: str = "group"
    fuse: str = "sum"
    relative: bool = False
    centre: bool = True
    damping: float = 0.01
    modules_per_pass: int | None = None
    progress: bool = False

    name: ClassVar[str] = "obs"
    needs: ClassVar[tuple[str, ...]] = ("weights", "activations")
    additive: ClassVar[bool] = True
    summary: ClassVar[str] = "second-order rise of the layer's output error; needs prompts or data"

    def scores(self, model: nn.Module, sites: Sites, calibration: Sequence[ModelCall]) -> dict[str, Tensor]:
        """Site name -> scores of shape `(size,)`, float32.

        Args:
            calibration: played once for every package of layers.

        Raises:
            GenpruneError: a site is of a kind without a consumer, or activations are not finite.
            BadCalibrationData: no call.
        """
        if not calibration:
            raise BadCalibrationData("no calibration call; expected at least one. Pass prompts or data.")
        gated = consumers(sites)
        scored = {site.name for entries in gated.values() for site, _ in entries}
        if left := [name for name in sites if name not in scored]:
            raise GenpruneError(
                f"'{left[0]}' has no layer that reads its units, so that OBS has no score for it; expected heads, "
                "neurons or channels. Leave its kind out, or score it with gp.Taylor."
            )
        parts: dict[str, list[Tensor]] = {name: [] for name in sites}
        moments_of = input_moments(model, list(gated), calibration, self.modules_per_pass, self.progress)
        for path, moments in moments_of:
            layer = model.get_submodule(path)
            if not torch.isfinite(moments.second_sum).all():
                raise GenpruneError(
                    f"what '{path}' is given is not finite; expected finite activations. Check the model's weights, "
                    "and calibrate in float32 or bfloat16 rather than float16."
                )
            errors = self._errors(layer, moments)
            for site, point in gated[path]:
                width = point.width * taps(layer)
                start = point.offset * taps(layer)
                parts[site.name].append(errors(start, site.size, width).float().cpu())
        return {name: self._fused(streams) for name, streams in parts.items()}

    def _errors(self, layer: nn.Module, moments: Moments):
        """A function (first feature, units, features a unit) -> scores of these units for this layer."""
        weight = weight_matrix(layer)  # (out, features)
        second = moments.covariance if self.centre and layer.bias is not None else moments.second
        inverse = damped_inverse(2 * second, self.damping)
        energy = ((weight @ second) * weight).sum() if self.relative else second.new_ones(())

        def errors(start: int, units: int, width: int) -> Tensor:
            stop = start + units * width
            if self.form == "columns":
                rises = weight[:, start:stop].square().sum(0) / inverse.diagonal()[start:stop]
                rises = rises.reshape(units, width).sum(1)
            else:
                # Diagonal blocks (units, width, width) of the inverse, and the unit's columns (units, width, out).
                blocks = torch.stack([inverse[i : i + width, i : i + width] for i in range(start, stop, width)])
                columns = weight[:, start:stop].T.reshape(units, width, -1)
                rises = (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))
            return rises / 2 / energy.clamp_min(torch.finfo(torch.float64).tiny)

        return errors

    def _fused(self, streams: list[Tensor]) -> Tensor:
        total = torch.stack(streams).sum(0)
        if self.fuse == "sum" or len(streams) == 1:
            return total
        return fused_by_rank(streams)


def damped_inverse(matrix: Tensor, damping: float) -> Tensor:
    """The inverse of `matrix + damping * mean(diag) I`, for a positive semi-definite matrix in float64."""
    scale = matrix.diagonal().mean()
    if not scale > 0:  # a layer that is only given zeros
        return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    damped = matrix.clone()
    damped.diagonal().add_(max(damping, 1e-10) * scale)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


def fused_by_rank(streams: Sequence[Tensor], constant: int = RANK_CONSTANT) -> Tensor:
    """Sums of scores over streams, dealt out in the order of reciprocal rank fusion.

    Args:
        streams: one tensor of shape `(units,)` for each stream, higher = keep.
        constant: `k` of `sum_streams 1 / (k + rank)`, rank 1 being the highest score.

    Returns:
        Shape `(units,)`: the sorted sums in the fused order; ties by the sum.
    """
    scores = torch.stack(list(streams))  # (streams, units)
    total = scores.sum(0)
    ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1
    fused = (1.0 / (constant + ranks.double())).sum(0)
    by_total = total.argsort(stable=True)
    order = by_total[fused[by_total].argsort(stable=True)]  # ascending in (fused, total)
    dealt = torch.empty_like(total)
    dealt[order] = total.sort().values
    return dealt


def check_option(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises `GenpruneError` for an option that is none of those known."""
    if value not in known:
        raise GenpruneError(f"{name}={value!r}{nearest(str(value), known)}; expected one of {', '.join(known)}.")
