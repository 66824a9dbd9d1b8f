"""genprune: pruning for diffusion models and vision transformers, for Diffusers and timm.

Importing this package loads torch only. Everything that needs a host library is a lazy attribute.
"""

from __future__ import annotations

import importlib

from genprune.errors import (
    BadCalibrationData,
    BudgetUnreachable,
    CutFailed,
    GenpruneError,
    NoMatchingSites,
    PlanMismatch,
    UnsupportedModel,
)
from genprune.families import find_sites
from genprune.gates import attach_gates
from genprune.plan import PruningPlan
from genprune.sites import Site, Sites

__version__ = "0.1.0"

# Public name -> module that defines it. Diffusers reads `ModelMixin` and the Pruned classes from here when it loads a
# pipeline whose model_index.json says ["genprune", "Pruned..."].
_LAZY = {
    "cut": "genprune.cutting",
    "applied_plan": "genprune.cutting",
    "plan_base": "genprune.cutting",
    "ModelMixin": "genprune.pruned_models",
    "PrunedUNet2DConditionModel": "genprune.pruned_models",
    "PrunedUNet2DModel": "genprune.pruned_models",
    "PrunedFluxTransformer2DModel": "genprune.pruned_models",
    "PrunedSD3Transformer2DModel": "genprune.pruned_models",
    "PrunedDiTTransformer2DModel": "genprune.pruned_models",
    "PrunedPixArtTransformer2DModel": "genprune.pruned_models",
    "save_model": "genprune.saving",
    "load_model": "genprune.saving",
    "export_stock": "genprune.stock",
    "adapt_lora": "genprune.lora",
    "count_costs": "genprune.costs",
    "Costs": "genprune.costs",
    "compensate": "genprune.recovery",
    "recover": "genprune.recovery",
    "NormalizedDistillation": "genprune.recovery",
    "RecoveryResult": "genprune.recovery",
    "feature_pairs": "genprune.recovery",
    "make_plan": "genprune.planning",
    "score": "genprune.planning",
    "Magnitude": "genprune.methods",
    "OBS": "genprune.methods",
    "Random": "genprune.methods",
    "Taylor": "genprune.methods",
    "EcoDiff": "genprune.methods",
    "LaptopDiff": "genprune.methods",
    "LDPruner": "genprune.methods",
    "FinerCut": "genprune.methods",
    "TinyFusion": "genprune.methods",
    "preset_cards": "genprune.presets",
    "preset_plan": "genprune.presets",
    "prune_tokens": "genprune.tokens.handle",
    "search_tokens": "genprune.tokens.search",
    "token_presets": "genprune.tokens.presets",
    "ZeroTPrune": "genprune.tokens.methods",
    "ToMe": "genprune.tokens.methods",
    "DiffusionTokens": "genprune.tokens.diffusion",
    "load_pipeline": "genprune.pipelines",
    "prune_pipeline": "genprune.pipelines",
    "route_pipeline": "genprune.pipelines",
    "accelerate_pipeline": "genprune.pipelines",
    "APTP": "genprune.routers",
    "train_router": "genprune.routers",
    "finetune_experts": "genprune.routers",
}
_SUBPACKAGES = ("bench", "metrics", "miniature", "pipelines", "recovery", "routers", "tokens")

__all__ = [
    "BadCalibrationData",
    "BudgetUnreachable",
    "CutFailed",
    "GenpruneError",
    "NoMatchingSites",
    "PlanMismatch",
    "PruningPlan",
    "Site",
    "Sites",
    "UnsupportedModel",
    "attach_gates",
    "find_sites",
    *_LAZY,
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"genprune.{name}")
    raise AttributeError(f"module 'genprune' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_SUBPACKAGES])
