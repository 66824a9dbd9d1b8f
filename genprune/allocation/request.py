"""What a plan has to meet: a budget, and the constraints on each site."""

from __future__ import annotations

from dataclasses import dataclass

from genprune.errors import GenpruneError, NoMatchingSites, nearest
from genprune.sites import KINDS, Sites

QUANTITIES = ("params", "macs", "units")
# Kinds that narrow layers; the others remove whole modules and have to be asked for.
NARROWING = ("heads", "neurons", "channels", "modulation")


@dataclass(frozen=True)
class Request:
    """Budget and constraints of one plan.

    Args:
        keep: share of the whole dense denoiser that stays, in (0, 1].
        of: what `keep` is a share of: `params`, `macs`, or `units` (each kind keeps that share of its units).
        kinds: kinds of sites that may lose units.
        allocation: name of the allocation.
        min_keep: share of its units that a site of several units keeps at least, in [0, 1]; always at least one.
        round_to: neurons stay in multiples of this, >= 1.
        max_width_classes: at most this many combinations of widths among the blocks of one class; None: any.
        protect: shell-style patterns of site names that stay whole.
    """

    keep: float
    of: str
    kinds: tuple[str, ...]
    allocation: str = "global"
    min_keep: float = 0.05
    round_to: int = 1
    max_width_classes: int | None = None
    protect: tuple[str, ...] = ()


def default_kinds(sites: Sites) -> tuple[str, ...]:
    """The narrowing kinds that a model has."""
    return tuple(kind for kind in sites.kinds() if kind in NARROWING)


def check_budget(keep: float, of: str, quantities: tuple[str, ...] = QUANTITIES) -> None:
    """Raises `GenpruneError` for a budget that means nothing, or that a method cannot plan for."""
    if of == "latency" and "latency" not in quantities:
        raise GenpruneError(
            "of='latency' is a budget of methods that remove layers (gp.LaptopDiff, gp.LDPruner, gp.FinerCut); "
            f"expected {', '.join(map(repr, quantities))} here. Plan for of='macs' and pass measure_latency=True to "
            "make_plan, which times the plan against the dense model."
        )
    if of not in quantities:
        raise GenpruneError(f"of={of!r}{nearest(str(of), quantities)}; expected one of {', '.join(quantities)}.")
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise GenpruneError(
            f"keep={keep!r} is not a share of the dense model; expected a number in (0, 1]; 0.7 leaves 70 % of it."
        )


def check_kinds(kinds: tuple[str, ...]) -> None:
    """Raises `NoMatchingSites` for no kinds at all, or for a kind that no model has."""
    if not kinds:
        raise NoMatchingSites(
            f"kinds={kinds!r} names no kind of site; expected some of {KINDS}. Leave kinds out for the kinds that "
            "narrow layers."
        )
    for kind in kinds:
        if kind not in KINDS:
            raise NoMatchingSites(f"no kind of site is called '{kind}'{nearest(kind, KINDS)}; expected {KINDS}.")


def eligible(sites: Sites, request: Request) -> Sites:
    """The sites that may lose units: of the kinds asked for, not protected, and with no protected site inside.

    Raises:
        NoMatchingSites: a kind or pattern matches nothing, or nothing is left.
    """
    chosen = sites.of_kind(*request.kinds)
    if not request.protect:
        return chosen
    protected = set(sites.match(*request.protect))
    protected |= {above for name in protected for above in sites.ancestors(name)}
    left = [site for name, site in chosen.items() if name not in protected]
    if not left:
        raise NoMatchingSites(
            f"protect={list(request.protect)} covers all {len(chosen)} sites of kinds {', '.join(request.kinds)} in "
            f"{sites.host}; expected some that may go. Narrow the patterns, or add kinds."
        )
    return Sites.of(sites.host, left)
