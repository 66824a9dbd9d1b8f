"""A routed pipeline's folder: `routed_config.json`, `router/`, and the stock `pipeline/` or the name of one."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from genprune.errors import GenpruneError, PlanMismatch, nearest

FORMAT_VERSION = 1
CONFIG, PIPELINE, ROUTER = "routed_config.json", "pipeline", "router"
STORES = ("reordered", "materialised")
POLICIES = ("largest", "nearest", "error")


@dataclass(frozen=True)
class RoutedSettings:
    """How a router serves a pipeline.

    Args:
        store: `reordered`: one copy of the weights for all experts; `materialised`: the dense weights and cut copies.
        resident: cut copies that a materialised store keeps, >= 1.
        unfamiliar: what becomes of prompts that are unlike the training prompts, see `PromptRouter.route`.
        capacity: keep the mean MACs of each call within the trained budget, see `PromptRouter.route`.
    """

    store: str = "reordered"
    resident: int = 1
    unfamiliar: str = "largest"
    capacity: bool = False

    def __post_init__(self) -> None:
        for name, known in (("store", STORES), ("unfamiliar", POLICIES)):
            if (value := getattr(self, name)) not in known:
                raise GenpruneError(
                    f"{name}={value!r}{nearest(str(value), known)}; expected one of {', '.join(known)}. Pass one of "
                    "those."
                )
        if type(self.resident) is not int or self.resident < 1:
            raise GenpruneError(f"resident={self.resident!r}; expected how many cut copies stay. Pass 1 or more.")
        if type(self.capacity) is not bool:
            raise GenpruneError(f"capacity={self.capacity!r}; expected True or False. Pass one of them.")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def write_config(folder: Path, settings: RoutedSettings, base: str) -> None:
    """Write `routed_config.json`. `base` is a hub id or a path; `pipeline` is the folder of this name beside it."""
    data = {"format_version": FORMAT_VERSION, "base": base, **settings.to_json()}
    (folder / CONFIG).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def read_config(folder: str | os.PathLike) -> tuple[RoutedSettings, str]:
    """The settings, and where the stock pipeline is.

    Raises:
        PlanMismatch: no such file, or it is damaged, edited, or of a newer genprune.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise PlanMismatch(
            f"'{folder}' has no {CONFIG}; expected a folder that RoutedPipeline.save_pretrained wrote. Load a stock "
            "pipeline with gp.load_pipeline, or a router with genprune.routers.load_router."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlanMismatch(f"'{path}' is not whole JSON ({error}). Save the routed pipeline again.") from None
    version = data.get("format_version") if isinstance(data, dict) else None
    if type(version) is not int or version < 1:
        raise PlanMismatch(f"'{path}' has no format_version; expected {FORMAT_VERSION}. Save the pipeline again.")
    if version > FORMAT_VERSION:
        raise PlanMismatch(
            f"'{path}' has format {version}, this genprune reads up to {FORMAT_VERSION}. Upgrade with "
            "`pip install -U genprune`."
        )
    known = {"format_version", "base", *(each.name for each in fields(RoutedSettings))}
    for key in data:
        if key not in known:
            raise PlanMismatch(f"'{path}' has an unknown key '{key}'{nearest(key, known)}. Rename or remove it.")
    base = data.get("base")
    if not isinstance(base, str) or not base:
        raise PlanMismatch(f"'{path}' names no base ({base!r}); expected a folder or a hub id. Save it again.")
    return RoutedSettings(**{k: v for k, v in data.items() if k not in ("format_version", "base")}), base
