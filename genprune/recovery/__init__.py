"""What gives a cut model back some of its quality: closed-form compensation of the layers that read removed units."""

from __future__ import annotations

from genprune.recovery.compensation import Compensation, compensate

__all__ = ["Compensation", "compensate"]
