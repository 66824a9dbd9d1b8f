"""Clean latents and conditions on disk: one folder of safetensors and JSON, written whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genprune.errors import PlanMismatch
from genprune.files import check_replaceable, whole_folder
from genprune.recovery.conditions import Conditions

FORMAT_VERSION = 1
TENSORS, STATE = "latents.safetensors", "latents.json"


def save_latents(
    folder: str | os.PathLike,
    described: Mapping[str, Any],
    clean: Tensor,
    prompt_of: Sequence[int],
    conditions: Conditions,
) -> None:
    """Write them, replacing what an earlier run left there."""
    from safetensors.torch import save_file

    shared = conditions.shared
    tensors = {"clean": clean, "prompt_of": torch.tensor(prompt_of)}
    tensors |= {f"rows/{name}": value for name, value in conditions.rows.items()}
    tensors |= {f"negative/{name}": value for name, value in conditions.negative.items()}
    tensors |= {f"shared/{name}": value for name, value in shared.items() if isinstance(value, Tensor)}
    state = {
        "format_version": FORMAT_VERSION,
        "described": dict(described),
        "shared": {name: value for name, value in shared.items() if not isinstance(value, Tensor)},
        "first_call": conditions.first_call,
        "first_timestep": conditions.first_timestep,
        "layout": list(conditions.layout),
        "dtype": str(conditions.dtype).removeprefix("torch."),
    }
    check_replaceable(folder, STATE, "teacher data")
    with whole_folder(folder) as written:
        # views of one batch share memory, which safetensors does not write
        plain = {"memory_format": torch.contiguous_format}
        save_file({name: value.detach().cpu().clone(**plain) for name, value in tensors.items()}, written / TENSORS)
        (written / STATE).write_text(json.dumps(state))


def load_latents(
    folder: str | os.PathLike, described: Mapping[str, Any]
) -> tuple[Tensor, list[int], Conditions] | None:
    """What `save_latents` wrote for the same description; None where there is nothing, or something else.

    Raises:
        PlanMismatch: the folder is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / STATE).is_file():
        return None
    try:
        state = json.loads((folder / STATE).read_text())
        if state["format_version"] != FORMAT_VERSION or state["described"] != json.loads(json.dumps(dict(described))):
            return None
        tensors = load_file(folder / TENSORS)
        groups: dict[str, dict[str, Tensor]] = {"rows": {}, "negative": {}, "shared": {}}
        for key, value in tensors.items():
            group, _, name = key.partition("/")
            if name:
                groups[group][name] = value
        conditions = Conditions(
            rows=groups["rows"],
            shared=state["shared"] | groups["shared"],
            negative=groups["negative"],
            first_call=state["first_call"],
            first_timestep=state["first_timestep"],
            layout=tuple(state["layout"]),
            dtype=getattr(torch, state["dtype"]),
        )
        return tensors["clean"], tensors["prompt_of"].tolist(), conditions
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise PlanMismatch(
            f"'{folder}' holds no readable teacher data ({error}); expected {STATE} and {TENSORS}. Delete the folder "
            "to draw them again."
        ) from None
