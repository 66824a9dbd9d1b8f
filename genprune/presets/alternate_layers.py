"""Every other block of a transformer goes: the plain shape that learned and scored depths are compared with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from genprune.errors import GenpruneError, UnsupportedModel
from genprune.families import host_name
from genprune.sites import Sites

HOSTS = ("DiTTransformer2DModel", "PixArtTransformer2DModel", "FluxTransformer2DModel", "SD3Transformer2DModel")
HOSTS += ("VisionTransformer",)


def alternate_blocks(model: nn.Module, sites: Sites, keep: float | None) -> list[str]:
    """Names of the blocks that go, of each list of blocks by itself; the first of a list always stays.

    Args:
        model: dense, of one of `HOSTS`.
        keep: share of the blocks of each list that stays, in (0, 1); None: the blocks 0, 2, 4, ... stay.

    Raises:
        UnsupportedModel: another host. GenpruneError: the share asks for more than the blocks that can go, or none.
    """
    if (found := host_name(model)) not in HOSTS:
        raise UnsupportedModel(
            f"'alternate-layers' is a shape of transformers, and the model is a {found}; expected one of "
            f"{', '.join(HOSTS)}. Pass a shape such as 'bk-sdm-base' for a U-Net; see gp.preset_cards()."
        )
    removed = []
    for path, indices in _lists(sites).items():
        total = len(model.get_submodule(path))
        chosen = [i for i in indices if i % 2] if keep is None else _spread(path, indices, total, keep)
        removed += [f"{path}.{index}:block" for index in chosen]
    if not removed:
        raise GenpruneError(
            f"no block of this {found} goes under keep={keep}; its lists have "
            f"{', '.join(str(len(model.get_submodule(path))) for path in _lists(sites))} blocks. Pass a smaller keep."
        )
    return removed


def _lists(sites: Sites) -> dict[str, list[int]]:
    """Path of each list of blocks -> the blocks that can go; SD3's last one cannot."""
    lists: dict[str, list[int]] = {}
    for site in sites.values():
        if site.kind == "block":
            path, _, index = site.path.rpartition(".")
            lists.setdefault(path, []).append(int(index))
    return lists


def _spread(path: str, movable: Sequence[int], total: int, keep: float) -> list[int]:
    """The blocks that go so that the share stays, at even distances; of those that can go, the first stays."""
    fixed = total - len(movable)
    left = round(keep * total) - fixed
    if left < 1:
        raise GenpruneError(
            f"keep={keep} leaves {left + fixed} of {total} blocks of '{path}', of which {fixed + 1} always stay; "
            f"expected a share of {(fixed + 1) / total:.3f} or more. Pass a larger keep."
        )
    stay = {movable[index * len(movable) // left] for index in range(left)}
    return [index for index in movable if index not in stay]
