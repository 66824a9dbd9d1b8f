"""The processes of a run, as accelerate starts them, and the pipeline on this one's device."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from genprune.families import denoiser_slot
from genprune.model_source import ModelSource


def process_state(cpu: bool) -> PartialState:
    """Joins the process group of the launcher, if there is one."""
    # without cpu=True accelerate takes several CPU processes for unrelated ones
    return PartialState(cpu=cpu or not torch.accelerator.is_available())


def load_on(source: ModelSource, state: PartialState, dtype: torch.dtype) -> Any:
    """The pipeline on this process's device; its denoiser in shards where accelerate's configuration says FSDP."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("true", "1"):
        return source.load(state.device, dtype)
    pipe = source.load("cpu", dtype)
    slot = denoiser_slot(pipe)
    shard_(getattr(pipe, slot))
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name != slot:
            part.to(state.device)
    return pipe


def shard_(model: nn.Module) -> None:
    """Split a model's weights over the processes, in place (FSDP2). The learned logits are none of them."""
    from accelerate import Accelerator
    from accelerate.utils import fsdp2_prepare_model

    model.requires_grad_(False)  # before they are split: the shards remember it
    fsdp2_prepare_model(Accelerator(), model)
