"""Benchmarks: the same prompts and seeds for every candidate, one result JSON, one HTML report.

from genprune.bench import Sampling, run_benchmark
run_benchmark(["dense=miniature", "pruned=DIR/pipeline"], "out", sampling=Sampling(num_inference_steps=20))
"""

from __future__ import annotations

import importlib

_PLACES = {
    "benchmark": ("describe", "run_benchmark"),
    "candidate": ("Candidate", "read_candidates"),
    "compare": ("Measurement", "compare_images"),
    "data": ("BenchData", "coco_data", "dataset_data", "miniature_data", "prompt_data"),
    "errors": ("BadCandidate", "BadResult", "RunMismatch"),
    "grading": ("grader_extractor", "scene_grader"),
    "instruments": ("INSTRUMENTS", "instrument"),
    "memory": ("candidate_memory",),
    "report": ("BarChart", "PictureGrid", "Table", "write_report"),
    "result": ("environment", "read_result", "repeatable", "write_result"),
    "run": ("draw_images", "load_image"),
    "sampling": ("Sampling", "image_seed"),
    "speed": ("compare_speed",),
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # next time without this function
    return value
