"""What the codes begin around: logits that EcoDiff learned, or a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import genprune as gp
from genprune.costs import operating_point, site_costs
from genprune.cutting import plan_base
from genprune.errors import PlanMismatch, nearest
from genprune.families import denoiser
from genprune.masks.logits import MaskLogits
from genprune.plan import PruningPlan
from genprune.scores import Scores


def read_scores(path: Path | None, pipe: Any, point: dict[str, int] | None) -> Scores | PruningPlan | None:
    """`logits.safetensors` of scripts/train_masks.py as scores; else a plan, by its folder or file.

    Raises:
        PlanMismatch: it is neither, or of another model.
    """
    if path is None:
        return None
    if path.is_dir():
        return PruningPlan.load(path)
    try:
        logits, _ = MaskLogits.load(path)
    except PlanMismatch as error:
        try:
            return PruningPlan.load(path)
        except PlanMismatch:
            raise PlanMismatch(
                f"'{path}' holds neither mask logits nor a plan; expected logits.safetensors of "
                "scripts/train_masks.py, or a plan's folder or file. Check --scores."
            ) from error
    model = denoiser(pipe)
    costs = site_costs(model, operating_point(model, **(point or {})))
    for name, values in logits.items():
        if name not in costs.sites or len(values) != costs.sites[name].size:
            raise PlanMismatch(
                f"'{path}' has {len(values)} logits for '{name}', which is no such site of this "
                f"{type(model).__name__}{nearest(name, costs.sites)}; expected logits that were learned on this base. "
                "Check --scores."
            )
    kinds = tuple(dict.fromkeys(costs.sites[name].kind for name in logits))
    made_by = {"method": "ecodiff", "logits": path.name}
    return Scores(logits.detached(), gp.EcoDiff(kinds=kinds), plan_base(model), costs, costs.total, made_by)
