"""The errors genprune raises. Each message says what was found, what was expected, and what to type next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GenpruneError(ValueError):
    """Base of every error that genprune raises on purpose."""


class UnsupportedModel(GenpruneError):
    """No family knows this class of model, or a part of it cannot be cut exactly."""


class NoMatchingSites(GenpruneError):
    """A name, pattern or kind matched no site of the model."""


class PlanMismatch(GenpruneError):
    """A plan, folder or LoRA belongs to another model, or is damaged."""


class CutFailed(GenpruneError):
    """A cut failed midway: the model is partly cut, and refuses to run, to be saved and to be cut."""


class BudgetUnreachable(GenpruneError):
    """No legal plan meets the budget; the message holds a table of what is reachable."""


class BadCalibrationData(GenpruneError):
    """Calibration prompts, images or batches are missing or have the wrong shape."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`, nearest name: 'x'` for an error message, or an empty string when nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f", nearest name: '{close[0]}'" if close else ""
