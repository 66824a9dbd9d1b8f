"""Low-rank updates of a model's linear layers by plain hooks: trained beside the gates, and gone without a trace."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from genprune.replacements import ScatteredLinear


def low_rank_tensors(model: nn.Module, paths: Iterable[str], rank: int, seed: int) -> dict[str, Tensor]:
    """Fresh tensors for every linear layer at or inside these module paths.

    Returns:
        `"PATH/down"` -> `(rank, in)`, uniform as a new linear layer's weight, and `"PATH/up"` -> `(out, rank)`, zeros,
        float32: the update starts at zero.
    """
    inside = tuple(f"{path}." for path in paths)
    tensors = {}
    for path, module in model.named_modules():
        plain = isinstance(module, nn.Linear) and not isinstance(module, ScatteredLinear) and module.weight.numel()
        if plain and f"{path}.".startswith(inside):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + len(tensors))
            bound = 1 / math.sqrt(module.in_features)
            down = (torch.rand(rank, module.in_features, generator=generator) * 2 - 1) * bound
            tensors[f"{path}/down"] = down.to(module.weight.device)
            tensors[f"{path}/up"] = torch.zeros(module.out_features, rank, device=module.weight.device)
    return tensors


class _Update:
    """Adds `scale * up @ down @ x` to what one linear layer returns."""

    def __init__(self, owner: LowRankUpdates, down: Tensor, up: Tensor):
        self.owner, self.down, self.up = owner, down, up

    def hook(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        if not self.owner.enabled:
            return output
        down, up = self.down.to(output.dtype), self.up.to(output.dtype)
        return output + self.owner.scale * (inputs[0] @ down.T @ up.T)


class LowRankUpdates:
    """LoRA on a model for the length of a `with` block; no layer is replaced, and no parameter of the model changes.

        y = W x + (alpha / r) B A x

    Attach it before the gates: they then act on the sum, as they would on a trained layer.

    Args:
        tensors: of `low_rank_tensors`, A under `/down` and B under `/up`; used as they are, and so can be trained.
        alpha: the update is scaled by `alpha / rank`.

    Reference:
        LoRA (Hu et al., arXiv 2106.09685).
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor], alpha: float) -> None:
        self.model, self.tensors, self.alpha = model, tensors, alpha
        self.enabled = True
        self._hooks: list = []

    @property
    def scale(self) -> float:
        rank = next(iter(self.tensors.values())).shape[0]
        return self.alpha / rank

    @contextmanager
    def off(self):
        """The model without the updates inside the block."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    def __enter__(self) -> LowRankUpdates:
        try:
            for name, down in self.tensors.items():
                path, _, part = name.rpartition("/")
                if part == "down":
                    update = _Update(self, down, self.tensors[f"{path}/up"])
                    self._hooks.append(self.model.get_submodule(path).register_forward_hook(update.hook))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
