"""What may be done to a model's layers: `Candidate` removes one, or puts an operator in its place, as plain data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from genprune.costs import SiteCosts
from genprune.errors import NoMatchingSites
from genprune.gates import attach_gates
from genprune.layers.swapping import removal, swapped
from genprune.operations import operator_of
from genprune.operators import beside
from genprune.sites import Sites

DEPTH_KINDS = ("branch", "block", "wrapper")


@dataclass(frozen=True)
class Candidate:
    """One change of a model's layers.

    Args:
        name: unique; the site's name for a removal.
        paths: of the modules that it changes; candidates whose modules nest exclude each other.
        saves: quantity (`params`, `macs`, `latency`) -> what goes, in numbers or milliseconds.
        keep: site name -> kept units, where units go; all of them for a removal.
        ops: operations of a plan, where an operator takes a module's place.
        tensors: of those operations.
        removes: name of the site that goes as a whole, where one does.
    """

    name: str
    paths: tuple[str, ...]
    saves: Mapping[str, float] = field(default_factory=dict)
    keep: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    ops: tuple[dict[str, Any], ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    removes: str | None = None


def removal_candidates(sites: Sites, costs: SiteCosts, kinds: Sequence[str] = DEPTH_KINDS) -> list[Candidate]:
    """The removal of each layer of these kinds: a branch, a block or a whole wrapper, one at a time.

    Raises:
        NoMatchingSites: the model has none.
    """
    found = []
    for name, site in sites.items():
        if site.kind in kinds and site.kind in DEPTH_KINDS:
            saved = costs.unit(name)
            found.append(
                Candidate(
                    name=name,
                    paths=tuple(change.module for change in site.emptied),
                    saves={"params": saved.params, "macs": saved.macs},
                    keep={name: torch.zeros(1, dtype=torch.bool)},
                    removes=name,
                )
            )
    if not found:
        raise NoMatchingSites(
            f"{sites.host} has no removable layer of kinds {', '.join(kinds)}; it has sites of kinds "
            f"{', '.join(sites.kinds())}. Pass kinds among {', '.join(DEPTH_KINDS)}."
        )
    return found


def stand_ins(model: nn.Module, sites: Sites, candidate: Candidate) -> dict[str, nn.Module]:
    """Module path -> what stands there under a candidate; nothing of the model changes.

    Units that go while others of their site stay are no stand-in: `applied` gates them.
    """
    modules: dict[str, nn.Module] = {}
    for name, mask in candidate.keep.items():
        if not mask.any():
            modules |= removal(model, sites[name])
    for op in candidate.ops:
        removed = model.get_submodule(op["path"])
        modules[op["path"]] = beside(operator_of(op, candidate.tensors, removed), removed, model)
    return modules


@contextmanager
def applied(model: nn.Module, sites: Sites, candidates: Iterable[Candidate]) -> Iterator[None]:
    """The model with these changes inside the block: layers swapped, units gated; as it was afterwards, to the bit."""
    modules: dict[str, nn.Module] = {}
    gates: dict[str, Tensor] = {}
    for candidate in candidates:
        modules |= stand_ins(model, sites, candidate)
        gates |= {name: mask.float() for name, mask in candidate.keep.items() if mask.any()}
    with attach_gates(model, gates, sites) if gates else nullcontext(), swapped(model, outermost(modules)):
        yield


def outermost(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The stand-ins that lie in no other one's place."""
    return {
        path: module
        for path, module in modules.items()
        if not any(path.startswith(f"{other}.") for other in modules if other != path)
    }


def conflicts(first: Candidate, second: Candidate) -> bool:
    """Whether two candidates change the same module, or one lies in what the other changes."""
    return any(nested(a, b) for a in first.paths for b in second.paths)


def nested(first: str, second: str) -> bool:
    """Whether two module paths are the same, or one module lies in the other."""
    return f"{first}.".startswith(f"{second}.") or f"{second}.".startswith(f"{first}.")


def exclusions(candidates: Sequence[Candidate]) -> list[tuple[int, ...]]:
    """Groups of indices of which one candidate may be taken: those of one module and of all modules around it."""
    touching: dict[str, list[int]] = {}
    for index, candidate in enumerate(candidates):
        for path in candidate.paths:
            touching.setdefault(path, []).append(index)
    groups = {}
    for path in touching:
        parts = path.split(".")
        around = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        members = sorted({index for each in around for index in touching.get(each, ())})
        if len(members) > 1:
            groups[tuple(members)] = None
    return [group for group in groups if not any(set(group) < set(other) for other in groups)]


def families_of_children(candidates: Sequence[Candidate], sites: Sites) -> list[tuple[int, ...]]:
    """Groups of which not all may be taken: the removals of everything inside a block or wrapper that may go itself.

    What would be left of it (norms, projections, modulation) is no identity and costs something: it goes as a whole.
    """
    removed = {candidate.removes: index for index, candidate in enumerate(candidates) if candidate.removes}
    children: dict[str, list[str]] = {}
    for name, site in sites.items():
        if site.kind in DEPTH_KINDS and site.parent in removed:
            children.setdefault(site.parent, []).append(name)
    return [
        tuple(removed[name] for name in names) for names in children.values() if all(name in removed for name in names)
    ]


_INDEX = re.compile(r"\.(\d+)(?=[.:])")


def sequences(candidates: Sequence[Candidate]) -> dict[str, dict[int, int]]:
    """Removals that repeat along a list of blocks: pattern (`blocks.*:block`) -> block number -> candidate's index.

    The number is the last one of the site's name: of `transformer_blocks.3.attn:branch`, 3.
    """
    found: dict[str, dict[int, int]] = {}
    for index, candidate in enumerate(candidates):
        numbers = list(_INDEX.finditer(candidate.removes or ""))
        if numbers:
            last = numbers[-1]
            pattern = f"{candidate.removes[: last.start()]}.*{candidate.removes[last.end() :]}"
            found.setdefault(pattern, {})[int(last.group(1))] = index
    return found
