"""Models while a recovery runs: on which device, in which mode, with which parameters, and back as they were."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from genprune.denoising.switches import blocks_checkpointed, frozen
from genprune.errors import GenpruneError
from genprune.families import denoiser_slot
from genprune.untouched import untouched


@contextmanager
def teaching(teacher: nn.Module, device: torch.device) -> Iterator[None]:
    """The teacher frozen, in evaluation mode and on the device; as it was afterwards."""
    before = _device(teacher)
    with untouched(teacher):
        try:
            teacher.to(device)
            yield
        finally:
            teacher.to(before)


@contextmanager
def training_mode(
    student: nn.Module, trained: Mapping[str, nn.Parameter], device: torch.device, checkpointed: bool
) -> Iterator[None]:
    """The student on the device, in evaluation mode, only `trained` requiring gradients; back afterwards."""
    modes = {module: module.training for module in student.modules()}
    before = _device(student)
    with ExitStack() as stack:
        stack.enter_context(frozen(student, but=tuple(trained.values())))
        stack.enter_context(_checkpointed(student, checkpointed))
        try:
            student.to(device).eval()
            yield
        finally:
            student.to(before)
            for module, mode in modes.items():
                module.training = mode
            for parameter in trained.values():
                parameter.grad = None


@contextmanager
def _checkpointed(model: nn.Module, enabled: bool) -> Iterator[None]:
    """The host's own gradient checkpointing, switched on; as before afterwards."""
    if not enabled:
        yield
    elif hasattr(model, "enable_gradient_checkpointing"):
        with blocks_checkpointed(model, True):
            yield
    elif hasattr(model, "set_grad_checkpointing"):
        before = getattr(model, "grad_checkpointing", False)
        model.set_grad_checkpointing(True)
        try:
            yield
        finally:
            model.set_grad_checkpointing(before)
    else:
        raise GenpruneError(
            f"{type(model).__name__} has no gradient checkpointing of its own; expected a diffusers or timm model. "
            "Pass gradient_checkpointing=False."
        )


@contextmanager
def on_device(targets: tuple[Any, ...], device: torch.device) -> Iterator[None]:
    """Every part of the pipelines on the device, to draw and to encode; back afterwards."""
    parts = [
        (part, _device(part))
        for target in targets
        if denoiser_slot(target) is not None
        for part in target.components.values()
        if isinstance(part, nn.Module) and _device(part).type != device.type
    ]
    try:
        for part, _ in parts:
            part.to(device)
        yield
    finally:
        for part, before in parts:
            part.to(before)


def trained_parameters(student: nn.Module, lora: bool, adapter: str) -> dict[str, nn.Parameter]:
    """Name -> parameter that the recovery trains: those of the LoRA, or all that require a gradient.

    Raises:
        GenpruneError: there is none, or one is in float16, in which an optimiser's steps are lost.
    """
    named = dict(student.named_parameters())
    if lora:
        parts = (f".lora_A.{adapter}.", f".lora_B.{adapter}.")
        trained = {name: each for name, each in named.items() if any(part in name for part in parts)}
    else:
        trained = {name: each for name, each in named.items() if each.requires_grad and each.numel()}
    if not trained:
        raise GenpruneError(
            f"no parameter of this {type(student).__name__} requires a gradient; expected some to train. Call "
            "model.requires_grad_(True) first."
        )
    half = next((name for name, each in trained.items() if each.dtype == torch.float16), None)
    if half is not None:
        raise GenpruneError(
            f"'{half}' is in float16; expected float32 weights to train. Load the target with "
            "torch_dtype=torch.float32 and pass mixed_precision='fp16', or train a LoRA with lora_rank=16."
        )
    return trained


def described_model(student: nn.Module, trained: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """What a checkpoint has to agree with: the host's class and the trained parameters."""
    shapes = [[name, list(parameter.shape), str(parameter.dtype)] for name, parameter in trained.items()]
    return {"class": type(student).__name__, "parameters": hashlib.sha256(repr(shapes).encode()).hexdigest()}


def _device(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in [*module.parameters(), *module.buffers()]), torch.device("cpu"))
