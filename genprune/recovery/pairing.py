"""`feature_pairs`: which feature of the teacher a student's is compared with, read off the two models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from genprune.errors import GenpruneError, NoMatchingSites, PlanMismatch, nearest
from genprune.families import denoiser, find_sites
from genprune.plan import PruningPlan
from genprune.replacements import PassThrough, Tombstone
from genprune.stock import stock_export_of

PAIRINGS = ("end_of_run", "same")
_ADVICE = 'Pass plan=, the plan that the student was cut by, or pairs=[("student.path", "teacher.path"), ...].'


def feature_pairs(
    student: Any,
    teacher: Any,
    *,
    plan: PruningPlan | None = None,
    pairing: str = "end_of_run",
    pairs: Sequence[tuple[str, str]] | None = None,
) -> list[tuple[str, str]]:
    """(student's module path, teacher's module path) of every pair of features, in module order.

    Taps are the members of the teacher's lists of blocks: the down and up blocks of a U-Net (BK-SDM's choice), every
    block of a transformer or ViT. A cut keeps the paths of what survives, so a tap pairs with its own path; in a stock
    export, with the path that the export gave it.

    Args:
        student: the cut model or its pipeline, a stock export, or a stock shape with fewer U-Net stages.
        teacher: the dense model or its pipeline.
        plan: what the student was cut by; needed for a stock export whose blocks were renumbered.
        pairing: where blocks behind a surviving one went, `end_of_run` pairs its output with the teacher's at the end
            of those that went: the next survivor reads it and was trained on that. `same` pairs it with its own, as
            the stages of a U-Net always do.
        pairs: used instead, after a look that both modules exist.

    Returns:
        The pairs; blocks that went, and what stands before the first survivor of a list, have none.

    Raises:
        NoMatchingSites: a path of `pairs` that a model lacks, or no pair at all. PlanMismatch: lists of other lengths
        without a plan. UnsupportedModel: no family knows the teacher.
    """
    student, teacher = denoiser(student), denoiser(teacher)
    if pairing not in PAIRINGS:
        raise GenpruneError(
            f"pairing={pairing!r}{nearest(str(pairing), PAIRINGS)}; expected one of {', '.join(PAIRINGS)}. Pass one."
        )
    if pairs is not None:
        found = [tuple(pair) for pair in pairs]
        for path, model, side in [(p[i], m, s) for p in found for i, (m, s) in enumerate(_sides(student, teacher))]:
            _check_path(path, model, side)
    else:
        found = []
        for path, length in block_lists(teacher).items():
            found += _pairs_of_list(student, teacher, path, length, plan, pairing)
    if not found:
        raise NoMatchingSites(
            f"no block of this {type(student).__name__} is one of the teacher's ({type(teacher).__name__}); expected "
            "a model cut from it. Pass pairs=[...], or feature_weight=0."
        )
    return found


def block_lists(model: nn.Module) -> dict[str, int]:
    """Path -> length of each list of blocks: the lists at the top of a model whose members hold sites."""
    lists = {}
    for site in find_sites(model).values():
        name = site.path.split(".")[0]
        module = getattr(model, name)
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            lists[name] = len(module)
    order = [name for name, _ in model.named_children()]
    return dict(sorted(lists.items(), key=lambda item: order.index(item[0])))


def is_removed(module: nn.Module | None) -> bool:
    """Whether only a tombstone is left of a block or of all its layers; one that holds weights stands for them."""
    if module is None or isinstance(module, PassThrough):
        return True
    if isinstance(module, Tombstone):
        return not any(True for _ in module.parameters())
    parts = ("resnets", "attentions", "downsamplers", "upsamplers")
    layers = [each for part in parts for each in getattr(module, part, None) or ()]
    return bool(layers) and all(is_removed(each) for each in layers)


def _is_u_shaped(model: nn.Module) -> bool:
    return hasattr(model, "down_blocks") and hasattr(model, "up_blocks")


def _sides(student: nn.Module, teacher: nn.Module) -> tuple[tuple[nn.Module, str], ...]:
    return (student, "student"), (teacher, "teacher")


def _check_path(path: str, model: nn.Module, side: str) -> None:
    modules = dict(model.named_modules())
    if path not in modules:
        raise NoMatchingSites(
            f"pairs names '{path}', which is no module of the {side} ({type(model).__name__})"
            f"{nearest(path, modules)}. Pass a path of its named_modules()."
        )


def _pairs_of_list(
    student: nn.Module, teacher: nn.Module, name: str, length: int, plan: PruningPlan | None, pairing: str
) -> list[tuple[str, str]]:
    """The pairs of one list of blocks."""
    places = _places(student, teacher, name, length, plan)
    survivors = [index for index in range(length) if places[index] is not None]
    if _is_u_shaped(teacher):
        pairing = "same"  # a stage changes the resolution: the end of a run of them is not comparable
    pairs = []
    for index, following in zip(survivors, [*survivors[1:], length]):
        other = following - 1 if pairing == "end_of_run" else index
        ours, theirs = places[index], f"{name}.{other}"
        pairs.append(_same_resolution(student, teacher, ours, theirs))
    return pairs


def _places(
    student: nn.Module, teacher: nn.Module, name: str, length: int, plan: PruningPlan | None
) -> list[str | None]:
    """Where the student has each block of a teacher's list; None where it went."""
    own = getattr(student, name, None)
    found = len(own) if isinstance(own, (nn.ModuleList, nn.Sequential)) else 0
    if found == length:
        paths = [f"{name}.{index}" for index in range(length)]
    elif plan is not None:
        paths = _exported(teacher, name, length, plan)
    elif name == "up_blocks" and 0 < found < length and _is_u_shaped(teacher):
        # The stages of a U-Net count from the picture inwards: those that went are the innermost.
        paths = [None] * (length - found) + [f"{name}.{index}" for index in range(found)]
    elif name == "down_blocks" and 0 < found < length and _is_u_shaped(teacher):
        paths = [f"{name}.{index}" for index in range(found)] + [None] * (length - found)
    else:
        raise PlanMismatch(
            f"'{name}' has {found} blocks in the student and {length} in the teacher; expected the same number, where "
            f"the paths say which is which. {_ADVICE}"
        )
    modules = dict(student.named_modules())
    return [None if path is None or is_removed(modules.get(path)) else path for path in paths]


def _exported(teacher: nn.Module, name: str, length: int, plan: PruningPlan) -> list[str | None]:
    """The path of each block in the stock export of a plan."""
    export = stock_export_of(teacher, plan.keep, *([plan.ops] if plan.ops else []))
    paths = []
    for index in range(length):
        # the export may rename parts of a block and not the block: any of its parts says where it is
        prefix = f"{name}.{index}."
        keys = [key[len(prefix) :] for key in teacher.state_dict() if key.startswith(prefix)]
        renamed = {(export.renamed(prefix + key) or "")[: -len(key)].rstrip(".") for key in keys}
        left = sorted(path for path in renamed if path.count(".") == name.count(".") + 1)
        paths.append(left[0] if left else None)
    return paths


def _same_resolution(student: nn.Module, teacher: nn.Module, ours: str, theirs: str) -> tuple[str, str]:
    """The pair itself, or the last layers before a resampler that only one of the two blocks has.

    The innermost of fewer U-Net stages does not sample down, where the teacher's does: BK-SDM Tiny compares the
    output of the last attention there.
    """
    blocks = student.get_submodule(ours), teacher.get_submodule(theirs)
    for name in ("downsamplers", "upsamplers"):
        has = [not all(is_removed(each) for each in getattr(block, name, None) or ()) for block in blocks]
        if has[0] == has[1]:
            continue
        for part, last in (("attentions", ".proj_out"), ("resnets", "")):
            left = [
                [index for index, each in enumerate(getattr(block, part, None) or ()) if not is_removed(each)]
                for block in blocks
            ]
            if all(left):
                return tuple(f"{path}.{part}.{each[-1]}{last}" for path, each in zip((ours, theirs), left))
    return ours, theirs
