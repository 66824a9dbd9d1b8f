"""Published shapes of smaller models as plans for a user's own dense checkpoint. Nothing is scored."""

from __future__ import annotations

from genprune.presets.plans import PresetCard, preset_cards, preset_plan

__all__ = ["PresetCard", "preset_plan", "preset_cards"]
