"""Drop-in pipelines: loading, pruning and routing of whole diffusers pipelines. Imported as `genprune.pipelines`.

Every name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib

# Public name -> module that defines it, one a line.
_LAZY = {
    "ExpertStore": "genprune.pipelines.stores",
    "MaterialisedStore": "genprune.pipelines.stores",
    "ReorderedStore": "genprune.pipelines.stores",
    "RoutedPipeline": "genprune.pipelines.routed",
    "accelerate_pipeline": "genprune.pipelines.wrappers",
    "load_pipeline": "genprune.pipelines.loading",
    "pipeline_folder": "genprune.pipelines.loading",
    "prune_pipeline": "genprune.pipelines.wrappers",
    "route_pipeline": "genprune.pipelines.wrappers",
}

__all__ = list(_LAZY)


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'genprune.pipelines' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
