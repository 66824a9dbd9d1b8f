"""diffusers' conditional U-Net (Stable Diffusion, SDXL): levels of resolution with transformer blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from genprune.costs import operating_point
from genprune.errors import UnsupportedModel
from genprune.families import OperatingPoint, family_of
from genprune.tokens.denoising_steps import Steps
from genprune.tokens.diffusion import DiffusionTokens
from genprune.tokens.level_costs import level_schedule
from genprune.tokens.level_hooks import LevelHooks, UNetEnds
from genprune.tokens.methods import TokenMethod
from genprune.tokens.state import TokenState


@dataclass
class UNetLevels:
    """A U-Net whose transformer blocks run on fewer tokens, level by level.

    Attributes:
        paths: one name per level, `level 0` the finest; the layers of methods and counts are levels.
        blocks: per level, the paths of its transformer blocks in the order in which they run.
        scored: levels where tokens can be reduced.
        settings: how the method is used; the handle writes it before it attaches.
        steps: shared by the hooks, once attached.
    """

    model: nn.Module
    settings: DiffusionTokens = field(default_factory=DiffusionTokens)
    steps: Steps | None = None
    prefix: int = 0
    merges: bool = True
    before_mlp: bool = False
    paths: tuple[str, ...] = field(init=False)
    blocks: tuple[tuple[str, ...], ...] = field(init=False)
    scored: tuple[int, ...] = field(init=False)

    denoiser = True

    def __post_init__(self) -> None:
        model, levels = self.model, len(self.model.down_blocks)
        places = [(f"down_blocks.{i}", i) for i in range(levels)]
        places.append(("mid_block", levels - 1))
        places += [(f"up_blocks.{i}", levels - 1 - i) for i in range(len(model.up_blocks))]
        blocks: list[list[str]] = [[] for _ in range(levels)]
        for path, level in places:
            blocks[level] += _self_attending(model, path)
        self.paths = tuple(f"level {level}" for level in range(levels))
        self.blocks = tuple(map(tuple, blocks))
        self.scored = tuple(level for level in range(levels) if len(blocks[level]) > 1)
        if not self.scored:
            raise UnsupportedModel(
                f"no resolution of this {type(model).__name__} has two transformer blocks with self-attention; "
                "expected one that chooses tokens and one that runs on fewer. Tokens cannot be reduced."
            )

    @property
    def point(self) -> OperatingPoint:
        """Where costs are counted."""
        return operating_point(self.model, **(self.settings.operating_point or {}))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Image tokens per level at the operating point."""
        height, width, found = self.point.height, self.point.width, []
        for _ in self.paths:
            found.append(height * width)
            height, width = (height + 1) // 2, (width + 1) // 2
        return tuple(found)

    @property
    def patches(self) -> int:
        """Image tokens of the finest level where tokens can be reduced."""
        return self.tokens[self.scored[0]]

    def check(self, method: TokenMethod) -> None:
        """Nothing that a method asks for stands in the way here; see `DiffusionTokens` for what has no effect."""

    def schedule(self, counts: Mapping[int, int]) -> tuple:
        """See `genprune.tokens.schedule.per_layer`."""
        return level_schedule(self, counts)

    def attach(self, state: TokenState) -> list:
        steps = self.steps = Steps(self.settings)
        handles = UNetEnds(state, steps).attach(self.model)
        depth = sum(map(len, self.blocks))
        layer = 0
        for level, paths in enumerate(self.blocks):
            for index, path in enumerate(paths):
                hooks = LevelHooks(state, steps, level, index == 0, layer, depth)
                handles += hooks.attach(self.model.get_submodule(path))
                layer += 1
        return handles

    def example_inputs(self, model: nn.Module) -> dict[str, Tensor]:
        weight = next(model.parameters())
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        return family_of(self.model).example_inputs(self.model, self.point, weight.device, dtype)


def _self_attending(model: nn.Module, path: str) -> list[str]:
    """Paths of the transformer blocks below `path` whose first attention is one of the image with itself."""
    part, found = model.get_submodule(path) if getattr(model, path.split(".")[0], None) is not None else None, []
    for index, wrapper in enumerate(getattr(part, "attentions", None) or ()):
        for number, block in enumerate(getattr(wrapper, "transformer_blocks", None) or ()):
            attention = getattr(block, "attn1", None)
            if hasattr(attention, "to_q") and not getattr(block, "only_cross_attention", False):
                found.append(f"{path}.attentions.{index}.transformer_blocks.{number}")
    return found


def host_of(model: nn.Module) -> UNetLevels | None:
    names = {cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("diffusers.")}
    return UNetLevels(model) if "UNet2DConditionModel" in names else None
