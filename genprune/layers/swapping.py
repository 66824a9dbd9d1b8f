"""Other modules in the places of a model's, for as long as a `with` block lasts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from genprune.errors import GenpruneError, NoMatchingSites, nearest
from genprune.interrupts import interrupt_deferred
from genprune.sites import Site

Slot = tuple[nn.Module, str]  # a module, and the name of the sub-module in it


@contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put modules in the places of host modules, in place, and put the originals back.

    The originals keep their weights, hooks and modes; they come back in the order that they had, also after an error.
    Hooks of a replaced module do not act on what stands in for it, as after a cut.

    Args:
        model: any module.
        modules: module path -> what stands there. All paths are looked up before the first swap, so that where one
            lies inside another the outer one stands and the inner one is never reached, as in a plan. A stand-in takes
            the training mode of the original; what it shares with the model keeps its own.

    Raises:
        GenpruneError: a path is no module of the model, or the model itself. Nothing has changed then.
    """
    with placed([(slot_of(model, path), module) for path, module in modules.items()], of=model):
        yield


@contextmanager
def placed(changes: Iterable[tuple[Slot, nn.Module]], of: nn.Module | None = None) -> Iterator[None]:
    """`swapped` for slots that were looked up before.

    Args:
        changes: slots and what to put there.
        of: the model; the training mode of its own modules is left alone, and that of new ones is set. None: no
            mode is set.
    """
    changes = list(changes)
    if of is not None and changes:
        _set_modes(changes, {id(module) for module in of.modules()})
    originals = [(parent, name, parent._modules[name]) for (parent, name), _ in changes]
    try:
        with interrupt_deferred():
            for (parent, name), module in changes:
                parent._modules[name] = module
        yield
    finally:
        with interrupt_deferred():
            for parent, name, original in reversed(originals):
                parent._modules[name] = original


def slot_of(model: nn.Module, path: str) -> Slot:
    """Where a module hangs: its parent, and its name there. Raises `GenpruneError` where nothing is."""
    parent, _, name = path.rpartition(".")
    try:
        holder = model.get_submodule(parent)
        found = holder._modules.get(name) if path else None
    except AttributeError:
        found = None
    if found is None:
        known = [known for known, _ in model.named_modules() if known]
        raise GenpruneError(
            f"'{path}' is no module inside this {type(model).__name__}{nearest(path, known)}; expected the path of "
            "one that can be replaced. List them with model.named_modules()."
        )
    return holder, name


def _set_modes(changes: list[tuple[Slot, nn.Module]], own: set[int]) -> None:
    for (parent, name), stand_in in changes:
        training = parent._modules[name].training
        for module in stand_in.modules():
            if id(module) not in own:
                module.training = training


def removal(model: nn.Module, site: Site) -> dict[str, nn.Module]:
    """What stands in a model's places once nothing of a site is kept: module path -> stand-in, for `swapped`.

    Nothing in the model changes. The stand-ins share the weights that stay, such as the shortcut of a ResNet block.

    Args:
        model: the model that `find_sites` found the site in, dense, cut or gated.
        site: of kind branch, block or wrapper, or any that is emptied by replacing modules alone.

    Returns:
        Stand-ins, built anew by each call. `swapped(model, removal(model, site))` computes what the model does after
        `gp.cut` by a plan that keeps nothing of the site.

    Raises:
        NoMatchingSites: layers outside of the replaced modules would have to be narrowed as well. GenpruneError: the
        site is of another model.
    """
    narrowed = [piece.module for piece in (*site.slices, *site.attributes) if site.shrinks(piece.module, 0)]
    if narrowed or not site.emptied:
        found = f"narrows '{narrowed[0]}'" if narrowed else "has no module to take out"
        raise NoMatchingSites(
            f"removing '{site.name}' {found}; expected a layer that leaves as a whole. Pass a site of "
            "gp.find_sites(model).of_kind('branch', 'block', 'wrapper')."
        )
    stand_ins = {}
    for change in site.emptied:
        parent, name = slot_of(model, change.module)
        stand_ins[change.module] = change.build(parent._modules[name])
    return stand_ins
