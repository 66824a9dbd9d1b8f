"""What gives a cut model back its quality: closed-form compensation before the cut, and distillation after it."""

from __future__ import annotations

from genprune.recovery.compensation import Compensation, compensate
from genprune.recovery.distillation import NormalizedDistillation
from genprune.recovery.loop import RecoveryResult
from genprune.recovery.pairing import feature_pairs
from genprune.recovery.recovering import recover
from genprune.recovery.training import RecoveryFailed

__all__ = [
    "Compensation",
    "NormalizedDistillation",
    "RecoveryFailed",
    "RecoveryResult",
    "compensate",
    "feature_pairs",
    "recover",
]
