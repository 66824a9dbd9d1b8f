"""What fine-tuning left for an expert: whole tensors, or a LoRA that is merged or runs beside the layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genprune.errors import PlanMismatch, nearest
from genprune.lora_names import parsed, read_lora
from genprune.replacements import ScatteredLinear
from genprune.routers.experts import Expert

# Layer path -> `lora_A` of shape (rank, in, ...) and `lora_B` of shape (out, rank, ...), its scale folded in.
LowRank = Mapping[str, tuple[Tensor, Tensor]]


def check_fine_tuned(expert: Expert, model: nn.Module) -> frozenset[str]:
    """Refuse files that are missing, damaged or for another model than this cut one, which may be without weights.

    Returns:
        Names of the parameters that the expert has tensors of its own for.

    Raises:
        PlanMismatch: says which file and which tensor.
    """
    if expert.lora is not None:
        read_low_rank(expert.lora, model)
    if expert.weights is None:
        return frozenset()
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters(remove_duplicate=False)}
    found = dict(_tensors(expert.weights, shapes_only=True))
    for name, shape in found.items():
        if shapes.get(name) != shape:
            has = f"has {shapes[name]} there" if name in shapes else f"has no such tensor{nearest(name, shapes)}"
            raise PlanMismatch(
                f"'{expert.weights}' holds '{name}' of shape {shape}; the {type(model).__name__} that the plan leaves "
                f"{has}. Expected weights that were fine-tuned after this cut: fine-tune the expert again."
            )
    return frozenset(found)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Fine-tuned tensors by parameter name of the cut model, on the CPU. Raises `PlanMismatch`."""
    return dict(_tensors(path))


def _tensors(path: Path, shapes_only: bool = False) -> Iterator[tuple[str, Tensor | tuple[int, ...]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():
                yield name, tuple(file.get_slice(name).get_shape()) if shapes_only else file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise PlanMismatch(
            f"'{path}' cannot be read as safetensors ({error}); expected the fine-tuned weights of an expert. Restore "
            "the file, or fine-tune the expert again."
        ) from None


def read_low_rank(path: Path, model: nn.Module) -> LowRank:
    """The LoRA of an expert by layer, on the CPU in float32.

    Args:
        path: a `pytorch_lora_weights.safetensors`, as diffusers or PEFT writes it, for the cut model.
        model: the cut model; its weights are not read.

    Raises:
        PlanMismatch: the file is damaged, or a tensor of it is for no layer of this model.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for name, value in read_lora(path).items():
        entry = parsed(name)
        if entry is None or entry.part == "unknown" or name.endswith(".bias"):
            raise PlanMismatch(
                f"'{path}' holds '{name}'; expected lora_A, lora_B and alpha of layers of the denoiser. Train the "
                "expert's LoRA with gp.recover, or merge this one into weights and pass those."
            )
        halves.setdefault(entry.path, {})[entry.part] = value.float()
    if not halves:
        raise PlanMismatch(f"'{path}' holds no tensor; expected a LoRA of the expert. Fine-tune it again.")
    return {layer: _checked(path, layer, parts, model) for layer, parts in halves.items()}


def _checked(path: Path, layer: str, parts: Mapping[str, Tensor], model: nn.Module) -> tuple[Tensor, Tensor]:
    modules = dict(model.named_modules())
    weight = modules[layer]._parameters.get("weight") if layer in modules else None
    down, up = parts.get("down"), parts.get("up")
    if weight is None or not isinstance(modules[layer], (nn.Linear, nn.Conv2d)):
        wrong = f"is for '{layer}', which is no linear or convolution of the cut model{nearest(layer, modules)}"
    elif down is None or up is None:
        wrong = f"has only one half of '{layer}'"
    elif (up.shape[0], *down.shape[1:]) != tuple(weight.shape) or up.shape[1] != down.shape[0]:
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        wrong = f"has shapes {shapes} for '{layer}', whose weight is {tuple(weight.shape)}"
    else:
        return down, up * (float(parts["alpha"]) / down.shape[0]) if "alpha" in parts else up
    raise PlanMismatch(
        f"the LoRA '{path}' {wrong}; expected one that was trained on this expert after the cut. Slice a LoRA of the "
        "dense base with gp.adapt_lora, or fine-tune the expert again."
    )


def load_fine_tuned_(model: nn.Module, expert: Expert) -> None:
    """Give a cut model with weights of its own the expert's tensors, and merge its LoRA: W + B A. In place."""
    with torch.no_grad():
        if expert.weights is not None:
            parameters = dict(model.named_parameters(remove_duplicate=False))
            for name, value in read_weights(expert.weights).items():
                parameters[name].copy_(value)
        if expert.lora is not None:
            for layer, (down, up) in read_low_rank(expert.lora, model).items():
                weight = model.get_submodule(layer).weight
                down, up = down.to(weight.device), up.to(weight.device)
                change = up.flatten(1) @ down.flatten(1)
                weight.copy_(weight.float() + change.view(weight.shape))


class LowRankAddition:
    """Adds `B (A x)` to a layer's output: a LoRA that is not merged, for weights that are shared.

    Args:
        down, up: as in `LowRank`, on the layer's device and in its dtype.
    """

    def __init__(self, down: Tensor, up: Tensor):
        self.down, self.up = down, up

    def attach(self, layer: nn.Module):
        return layer.register_forward_hook(self.add, with_kwargs=True)

    def add(self, layer: nn.Module, inputs: tuple, kwargs: dict, output: Tensor) -> Tensor:
        x = inputs[0] if inputs else kwargs["input"]
        if isinstance(layer, nn.Conv2d):
            narrow = F.conv2d(x, self.down, stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
            return output + F.conv2d(narrow, self.up)
        change = F.linear(F.linear(x, self.down), self.up)
        return output + (layer.scattered(change) if isinstance(layer, ScatteredLinear) else change)
