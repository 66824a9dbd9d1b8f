"""What pushes logits down: one function a form, each `(logits, relaxation) -> (size,)`, one value per unit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genprune.errors import GenpruneError, nearest
from genprune.masks.hard_concrete import HardConcrete


def smooth_l0(logits: Tensor, relaxation: HardConcrete) -> Tensor:
    """Expected L0 of undamped noise, `sigmoid(l - a log(-g / z))`: rises everywhere (Louizos et al., eq. 12)."""
    return relaxation.smooth_probability(logits)


def expected_l0(logits: Tensor, relaxation: HardConcrete) -> Tensor:
    """The true expected L0, `P(M > 0)` with the damped noise: no gradient where the noise cannot close the gate.

    With a damping of 0.5 that is everywhere above a logit of -0.89: use a small damping with this form.
    """
    return relaxation.probability(logits)


def absolute(logits: Tensor, relaxation: HardConcrete) -> Tensor:
    """`|l|`, as published for SD 2, SDXL and SD3. It pulls negative logits back up to 0, that is, it un-prunes."""
    return logits.abs()


def flat_sigmoid(logits: Tensor, relaxation: HardConcrete) -> Tensor:
    """`sigmoid(0.4 l + 1)`, as published for FLUX."""
    return torch.sigmoid(0.4 * logits + 1)


PENALTIES: dict[str, Callable[[Tensor, HardConcrete], Tensor]] = {
    "smooth_l0": smooth_l0,
    "expected_l0": expected_l0,
    "absolute": absolute,
    "flat_sigmoid": flat_sigmoid,
}


def check_penalty(name: str) -> None:
    """Raises `GenpruneError` for an unknown form."""
    if name not in PENALTIES:
        raise GenpruneError(
            f"penalty={name!r}{nearest(str(name), PENALTIES)}; expected one of {', '.join(PENALTIES)}."
        )
