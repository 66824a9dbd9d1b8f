"""Masks: gates that are learned. A logit per unit, relaxed to [0, 1], trained through the whole denoising chain."""

from __future__ import annotations

from genprune.masks.hard_concrete import HardConcrete
from genprune.masks.logits import MaskLogits
from genprune.masks.settings import MaskTraining
from genprune.masks.training import MaskProblem, TrainedMasks, train_masks

__all__ = ["HardConcrete", "MaskLogits", "MaskProblem", "MaskTraining", "TrainedMasks", "train_masks"]
