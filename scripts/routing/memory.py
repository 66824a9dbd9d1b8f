"""Peak memory of a fresh process that serves eight experts, over that of one that serves the dense model.

`python -m scripts.routing.memory KIND FOLDER` is the child: `dense`, `reordered` or `materialised`, with the plans
in the folder. It builds the pipeline around a U-Net with random weights, draws with every expert in turn, and reports.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from genprune.plan import PruningPlan

KINDS = ("dense", "reordered", "materialised")
STEPS = 2
ROOT = Path(__file__).resolve().parents[2]


def memory(quick: bool) -> dict[str, Any]:
    """Peak of each kind: the median over children."""
    from .serving_bases import experts, large_unet

    model = large_unet()
    chosen = experts(model)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    del model
    with tempfile.TemporaryDirectory() as folder:
        for index, expert in enumerate(chosen):
            expert.plan.save(Path(folder) / f"{index:02d}")
        rows = {kind: _median([_child(kind, folder) for _ in range(1 if quick else 3)]) for kind in KINDS}
    return {"experts": len(chosen), "parameter_mb": weights / 1e6, "rows": rows}


def _child(kind: str, folder: str) -> dict[str, int]:
    command = [sys.executable, "-m", "scripts.routing.memory", kind, folder]
    child = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise SystemExit(f"the memory measurement of '{kind}' failed: {last}")
    return json.loads(child.stdout.strip().splitlines()[-1])


def _median(rows: list[dict[str, int]]) -> dict[str, Any]:
    rows = sorted(rows, key=lambda row: row["peak_bytes"])
    return {**rows[len(rows) // 2], "all_peak_bytes": [row["peak_bytes"] for row in rows]}


@torch.no_grad()
def measure(kind: str, folder: Path) -> dict[str, int]:
    """The child's work, in this process."""
    import diffusers  # noqa: F401  libraries are the baseline, not the cost of serving

    import genprune.pipelines.stores  # noqa: F401
    from genprune import miniature
    from genprune.metrics.memory import peak_rss_bytes, rss_bytes
    from genprune.pipelines.stores import MaterialisedStore, ReorderedStore
    from genprune.routers.experts import Expert

    from .serving_bases import large_unet, miniature_pipeline

    pipe = miniature_pipeline()
    prompts = miniature.prompts("test", 8, seed=0)
    options = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "latent"}
    pipe(prompts[0], **options)  # what every process has, whatever it serves
    before = rss_bytes()
    pipe.__dict__["unet"] = large_unet()
    plans = [PruningPlan.load(path) for path in sorted(folder.iterdir())]
    if kind != "dense":
        store = (ReorderedStore if kind == "reordered" else MaterialisedStore)(pipe.unet, [Expert(p) for p in plans])
    for index, prompt in enumerate(prompts):
        if kind != "dense":
            pipe.__dict__["unet"] = store.model  # nothing holds a copy that the store lets go
            pipe.__dict__["unet"] = store.activate(index % len(plans))
        pipe(prompt, **options)
    peak = peak_rss_bytes()
    return {"before_bytes": before, "peak_bytes": peak, "extra_bytes": peak - before}


def memory_figures(found: dict[str, Any]) -> dict[str, float]:
    """`memory_ratio_k8` leaves the libraries and the rest of the pipeline out, so that it is stricter."""
    dense = found["rows"]["dense"]
    figures = {"memory_ratio_k8": found["rows"]["reordered"]["extra_bytes"] / dense["extra_bytes"]}
    for kind in KINDS[1:]:
        row = found["rows"][kind]
        figures[f"memory_ratio_k8_{kind}"] = row["extra_bytes"] / dense["extra_bytes"]
        figures[f"memory_ratio_k8_{kind}_whole_process"] = row["peak_bytes"] / dense["peak_bytes"]
    return figures


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
