"""diffusers' transformers in a row: DiT, PixArt, SD3 and FLUX. Image tokens go, the text stays."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from genprune.costs import operating_point
from genprune.errors import UnsupportedModel
from genprune.families import OperatingPoint, family_of
from genprune.tokens.denoising_steps import Steps
from genprune.tokens.diffusion import DiffusionTokens
from genprune.tokens.methods import TokenMethod
from genprune.tokens.state import TokenState
from genprune.tokens.stream_hooks import StreamEnds, StreamHooks

FLUX_REFUSED = ("ip_adapter_image_embeds", "ip_hidden_states")  # read the queries before their rotation
CONTROL = ("controlnet_block_samples", "controlnet_single_block_samples", "block_controlnet_hidden_states")
TIMESTEP_PLACE = {"DiTTransformer2DModel": 1, "PixArtTransformer2DModel": 2}


@dataclass
class DiffusionTransformer:
    """A diffusers transformer whose blocks hand on one stream of image tokens.

    Attributes:
        settings: how the method is used; the handle writes it before it attaches.
        steps: shared by the hooks, once attached.
    """

    model: nn.Module
    settings: DiffusionTokens = field(default_factory=DiffusionTokens)
    steps: Steps | None = None
    prefix: int = 0
    merges: bool = False  # `reduce='auto'` drops: better than merging here (docs/tokens-compared.md)
    before_mlp: bool = False
    paths: tuple[str, ...] = field(init=False)
    scored: tuple[int, ...] = field(init=False)

    denoiser = True

    def __post_init__(self) -> None:
        self.paths = tuple(
            f"{name}.{index}"
            for name in ("transformer_blocks", "single_transformer_blocks")
            for index in range(len(getattr(self.model, name, ())))
        )
        blocks = [self.model.get_submodule(path) for path in self.paths]
        self.scored = tuple(index for index, block in enumerate(blocks) if _attention(block) is not None)
        if not self.scored:
            raise UnsupportedModel(
                f"no block of this {type(self.model).__name__} has a self-attention left; expected one to read "
                "queries and keys from. Tokens cannot be reduced."
            )

    @property
    def point(self) -> OperatingPoint:
        """Where costs are counted."""
        return operating_point(self.model, **(self.settings.operating_point or {}))

    @property
    def patches(self) -> int:
        """Image tokens at the operating point."""
        size = 2 if self._is("FluxTransformer2DModel") else self.model.config.patch_size  # FLUX packs 2 x 2 outside
        return (self.point.height // size) * (self.point.width // size)

    def check(self, method: TokenMethod) -> None:
        """Nothing that a method asks for stands in the way here; see `DiffusionTokens` for what has no effect."""

    def attach(self, state: TokenState) -> list:
        steps = self.steps = Steps(self.settings)
        flux = self._is("FluxTransformer2DModel")
        name = next((name for name in TIMESTEP_PLACE if self._is(name)), None)
        ends = StreamEnds(state, steps, TIMESTEP_PLACE.get(name, 3), CONTROL, FLUX_REFUSED if flux else ())
        handles = ends.attach(self.model)
        for layer, path in enumerate(self.paths):
            block = self.model.get_submodule(path)
            hooks = StreamHooks(
                state,
                steps,
                layer,
                _attention(block),
                joined=path.startswith("single_transformer_blocks"),
                tokens_first=flux,
                rope_place=3 if flux else None,
                mask_place=None if name is None else 1,
            )
            handles += hooks.attach(block)
        return handles

    def example_inputs(self, model: nn.Module) -> dict[str, Tensor]:
        weight = next(model.parameters())
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        return family_of(self.model).example_inputs(self.model, self.point, weight.device, dtype)

    def _is(self, name: str) -> bool:
        return any(cls.__name__ == name for cls in type(self.model).__mro__)


def _attention(block: nn.Module) -> nn.Module | None:
    """The self-attention of a block whose queries and keys can be read; None where a cut removed it."""
    for name in ("attn1", "attn"):
        attention = getattr(block, name, None)
        if attention is not None and hasattr(attention, "to_q") and hasattr(attention, "to_k"):
            return attention
    return None


HOSTS = ("DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel")


def host_of(model: nn.Module) -> DiffusionTransformer | None:
    names = {cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("diffusers.")}
    return DiffusionTransformer(model) if names & set(HOSTS) else None
