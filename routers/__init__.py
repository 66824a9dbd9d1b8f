"""Prompt routers, which choose among plans at run time. Imported as `genprune.routers`.

Every name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib

# Public name -> module that defines it, one a line.
_LAZY = {
    "APTP": "genprune.routers.settings",
    "Expert": "genprune.routers.experts",
    "PooledTextEncoder": "genprune.routers.encoders",
    "PromptRouter": "genprune.routers.router",
    "RouteStatistics": "genprune.routers.balance",
    "Routes": "genprune.routers.experts",
    "SentenceEncoder": "genprune.routers.encoders",
    "TimestepRouter": "genprune.routers.timestep_router",
    "TransformersEncoder": "genprune.routers.encoders",
    "encoder_of": "genprune.routers.encoders",
    "finetune_experts": "genprune.routers.finetuning",
    "load_router": "genprune.routers.router_format",
    "train_router": "genprune.routers.training",
}

__all__ = list(_LAZY)


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'genprune.routers' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
