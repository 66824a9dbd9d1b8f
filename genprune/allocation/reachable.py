"""What budgets a model can meet, and the error that says so."""

from __future__ import annotations

from dataclasses import replace

from genprune.allocation.request import Request, eligible
from genprune.allocation.steps import legal_widths
from genprune.costs import SiteCosts
from genprune.errors import BudgetUnreachable, NoMatchingSites


def least_keep(costs: SiteCosts, dense: int, request: Request) -> float:
    """The smallest share of the dense model that the request's kinds and constraints can leave."""
    sites = eligible(costs.sites, request)
    widths = {name: legal_widths(site, request)[-1] for name, site in sites.items()}
    if request.of == "units":
        return sum(widths.values()) / sum(site.size for site in sites.values())
    return getattr(costs.predict_widths(widths), request.of) / dense


def reachable_table(costs: SiteCosts, dense: int, request: Request) -> str:
    """One line per kind: sites, and the least share of the dense model left when only that kind goes."""
    kinds = costs.sites.kinds()
    sets = {kind: (kind,) for kind in kinds} | {"these kinds": request.kinds, "all kinds": kinds}
    lines = [f"  {'kind':<12} {'sites':>6}  least keep of {request.of}"]
    for label, chosen in sets.items():
        asked = replace(request, kinds=chosen)
        try:
            count, least = len(eligible(costs.sites, asked)), least_keep(costs, dense, asked)
        except NoMatchingSites:
            lines.append(f"  {label:<12} {0:>6}  all protected")
            continue
        lines.append(f"  {label:<12} {count:>6}  {least:.3f}")
    return "\n".join(lines)


def refuse(
    costs: SiteCosts, dense: int, request: Request, whole: int, least: int, closest: int | None = None
) -> BudgetUnreachable:
    """The error for a budget that no legal plan meets.

    Args:
        dense: the dense model's cost. whole, least: what is left with nothing and with everything legal gone.
        closest: the nearest that a plan comes, where the budget lies between two steps.
    """
    asked = f"keep={request.keep:g} of {request.of}"
    kinds = ", ".join(request.kinds)
    table = reachable_table(costs, dense, request)
    if whole < request.keep * dense and closest is None:
        return BudgetUnreachable(
            f"{asked} is more than this {costs.sites.host} has: it was cut to {whole / dense:.3f} of the dense model "
            f"before. Pass a keep of at most {whole / dense:.3f}, or start from the dense model."
        )
    if closest is not None:
        return BudgetUnreachable(
            f"{asked} lies between two legal plans of {costs.sites.host} with kinds {kinds}; the closest keeps "
            f"{closest / dense:.4f}. Pass that, or add a finer kind.\n{table}"
        )
    return BudgetUnreachable(
        f"{asked} cannot be reached in {costs.sites.host} with kinds {kinds}: at least {least / dense:.3f} of the "
        f"dense model stays (it can lose {1 - least / dense:.1%}). Raise keep, add kinds, or loosen min_keep and "
        f"protect.\n{table}"
    )
