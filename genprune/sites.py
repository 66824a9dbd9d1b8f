"""What can go: a `Site` says where a model can lose units, how they are gated and how they are cut, as plain data."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from genprune.errors import NoMatchingSites, nearest

# From the finest to the coarsest: a site's parent is always of a later kind.
KINDS = ("heads", "neurons", "channels", "modulation", "branch", "block", "wrapper")


@dataclass(frozen=True)
class GatePoint:
    """Where one gate multiplies an activation.

    Args:
        module: path of the module whose input or output is gated.
        side: `"input"` (first positional argument, the consumer of the units) or `"output"`.
        dim: feature dimension of that tensor: -1 for linear layers, 1 for convolutions.
        offset: first feature of unit 0.
        width: consecutive features per unit; 0 gates the whole tensor (sites of one unit).
        blend: empty: the output is multiplied. Otherwise one parameter name of `module.forward` for each item of
            its output: the output becomes `lerp(input, output, gate)`, because a removed block returns its input.
    """

    module: str
    side: str = "input"
    dim: int = -1
    offset: int = 0
    width: int = 1
    blend: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slice:
    """Entries of one layer that belong to the units of a site.

    Unit `u` owns entries `offset + u * width ... offset + (u + 1) * width - 1` of the layer's `side`:
    `"out"` is axis 0 of weight and bias (also of a norm's weight and bias), `"in"` is axis 1 of the weight.
    With `scatter` the layer still returns its full width, with zeros where rows went (AdaLN modulation).
    """

    module: str
    side: str
    offset: int = 0
    width: int = 1
    scatter: bool = False


@dataclass(frozen=True)
class SizeAttribute:
    """A plain number on a module that follows the kept units: `value = per_unit * kept`.

    With `item` the attribute is a list of numbers, of which one follows (the widths of a packed layer).
    """

    module: str
    name: str
    per_unit: int = 1
    item: int | None = None


@dataclass(frozen=True)
class Replacement:
    """What stands at `module` once nothing of the site is kept; `build` takes the host's module."""

    module: str
    build: Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Site:
    """One place of a model with `size` units that can go.

    Args:
        path: module path of the thing that the units belong to.
        kind: one of `KINDS`.
        size: number of units.
        gates: where a gate of shape `(size,)` acts.
        slices, attributes: how the layers shrink.
        emptied: what replaces modules when no unit stays; slices and attributes outside of those modules shrink to
            width zero, as all do where nothing is replaced.
        parent: name of the smallest site that contains this one; gone with it.
        attention: path of the module whose attention matmuls scale with the units (heads only).
    """

    path: str
    kind: str
    size: int
    gates: tuple[GatePoint, ...]
    slices: tuple[Slice, ...] = ()
    attributes: tuple[SizeAttribute, ...] = ()
    emptied: tuple[Replacement, ...] = ()
    parent: str | None = None
    attention: str | None = None

    @property
    def name(self) -> str:
        return f"{self.path}:{self.kind}"

    def shrinks(self, module: str, kept: int) -> bool:
        """Whether a layer or number at this module path follows `kept` units: not where a replacement stands then."""
        return kept > 0 or not any(f"{module}.".startswith(f"{change.module}.") for change in self.emptied)

    def cuts_into(self, modules: Iterable[str]) -> bool:
        """Whether narrowing or gating this site reaches into one of these modules, or the site lies inside one."""
        inner = {self.path, *(piece.module for piece in self.slices), *(number.module for number in self.attributes)}
        inner |= {point.module for point in self.gates if point.side == "input"} | {self.attention or self.path}
        return any(f"{path}.".startswith(f"{module}.") for path in inner for module in modules)


@dataclass(frozen=True)
class Sites(Mapping):
    """The sites of one model by name, in module order. Prints as a table; `sites.match("*attn2:heads")` selects.

    `refused` says of what looks like a site, but cannot be cut exactly, why: site name -> reason.
    """

    host: str
    by_name: dict[str, Site] = field(repr=False)
    refused: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, host: str, sites: Iterable[Site], refused: Mapping[str, str] | None = None) -> Sites:
        return cls(host, {site.name: site for site in sites}, dict(refused or {}))

    def __getitem__(self, name: str) -> Site:
        try:
            return self.by_name[name]
        except KeyError:
            raise NoMatchingSites(self._no_match(name)) from None

    def __contains__(self, name: object) -> bool:
        return name in self.by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)

    def kinds(self) -> tuple[str, ...]:
        present = {site.kind for site in self.values()}
        return tuple(kind for kind in KINDS if kind in present)

    def of_kind(self, *kinds: str) -> Sites:
        """The sites of these kinds. Raises `NoMatchingSites` where a kind is unknown or absent."""
        for kind in kinds:
            if kind not in self.kinds():
                raise NoMatchingSites(
                    f"no site of kind '{kind}' in {self.host}; it has {', '.join(self.kinds())}. Pass one of those."
                )
        return Sites.of(self.host, (site for site in self.values() if site.kind in kinds), self.refused)

    def match(self, *patterns: str) -> Sites:
        """The sites whose name fits a shell-style pattern. Raises `NoMatchingSites` for a pattern that fits none."""
        chosen: dict[str, Site] = {}
        for pattern in patterns:
            names = [n for n in self if n == pattern or fnmatch.fnmatchcase(n, pattern)]
            if not names:
                raise NoMatchingSites(self._no_match(pattern))
            chosen |= {n: self.by_name[n] for n in names}
        return Sites.of(self.host, (site for name, site in self.items() if name in chosen), self.refused)

    def ancestors(self, name: str) -> list[str]:
        """Names of the sites that contain this one, nearest first."""
        found, parent = [], self[name].parent
        while parent is not None:
            found.append(parent)
            parent = self[parent].parent
        return found

    def _no_match(self, name: str) -> str:
        if name in self.refused:
            return f"'{name}' cannot be cut: {self.refused[name]}. Pass another site of gp.find_sites(model)."
        return (
            f"no site matches '{name}' in {self.host} ({len(self)} sites{nearest(name, self)}). "
            "List them with gp.find_sites(model) or `genprune inspect`, then pass one of those names."
        )

    def __str__(self) -> str:
        lines = [f"{self.host}: {len(self)} sites"]
        for kind in self.kinds():
            members = [site for site in self.values() if site.kind == kind]
            lines.append(f"  {kind:<10} {len(members):>5} sites {sum(s.size for s in members):>9,} units")
        lines += [f"  refused    {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def effective_keep(sites: Sites, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks that change something: all-True masks and sites inside a removed site are left out."""
    gone = {name for name, mask in keep.items() if not mask.any()}
    return {
        name: mask
        for name, mask in keep.items()
        if not mask.all() and not any(parent in gone for parent in sites.ancestors(name))
    }


def kept_entries(mask: Tensor, slices: Iterable[tuple[Slice, Tensor]]) -> Tensor:
    """Mark in `mask` (bool, one entry per row or column of a layer) what the kept units of each slice leave.

    Args:
        mask: shape `(features,)`, all True before the first call.
        slices: pairs of a slice and its site's kept units, bool of shape `(size,)`.
    """
    for piece, keep in slices:
        stop = piece.offset + keep.numel() * piece.width
        mask[piece.offset : stop] = keep.repeat_interleave(piece.width)
    return mask
