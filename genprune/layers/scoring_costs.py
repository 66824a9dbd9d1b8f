"""What scoring many changes costs: the naive loop, and the least that prefix reuse can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from genprune.costs import Costs
from genprune.errors import GenpruneError
from genprune.layers.prefix import Changes, called, changed_outputs
from genprune.layers.timeline import Timeline


def reuse_costs(
    model: nn.Module, costs: Costs, changes: Changes, inputs: Mapping[str, Any] | Tensor
) -> tuple[int, int]:
    """MACs of `changed_outputs` without and with reuse, counted from a model's own costs.

    Naive: the unchanged model once, and for each change the whole changed model: all MACs, less those of the modules
    that are replaced, plus those of what stands in for them.

    Limit: the same, less the MACs of every module that was over when the first module of the change began. What
    the modules around it compute themselves, not in sub-modules, counts in full: their code runs again. A module that
    runs several times counts as over after its last call.

    Args:
        model: as for `changed_outputs`; on the meta device this costs no time.
        costs: `gp.count_costs(model, ...)` at the operating point of the inputs, their batch included.
        changes, inputs: as for `changed_outputs`, on the device of the model.

    Returns:
        `(naive_macs, limit_macs)`. Norms and elementwise work count nothing.

    Raises:
        GenpruneError: there is no change.
    """
    if not changes:
        raise GenpruneError("there is no change to count; expected at least one. Pass {name: removal(model, site)}.")
    timeline = Timeline(model, {path for change in changes.values() for path in change}, keep=False)
    with timeline:
        called(model, inputs)
    extra = _stand_in_macs(model, changes, inputs)
    naive = limit = costs.macs
    for name, change in changes.items():
        outermost = [p for p in change if not any(p.startswith(f"{outer}.") for outer in change)]
        whole = costs.macs - sum(costs.within(path).macs for path in outermost) + extra.get(name, 0)
        over = timeline.over_before(timeline.start_of(change)) if change else [timeline.root]
        naive += whole
        limit += whole - sum(costs.within(moment.path).macs for moment in over)
    return naive, limit


def _stand_in_macs(model: nn.Module, changes: Changes, inputs) -> dict[str, int]:
    """MACs of each change's stand-ins; those without parameters compute nothing that counts, and are not run."""
    from torch.utils.flop_counter import FlopCounterMode

    weighted = {
        name: change for name, change in changes.items() if any(True for m in change.values() for _ in m.parameters())
    }
    root, macs = type(model).__name__, {}
    outputs = changed_outputs(model, inputs, weighted)
    for _ in range(len(weighted) + 1 if weighted else 0):
        counter = FlopCounterMode(display=False)
        with counter:
            name, _ = next(outputs)
        inside = counter.get_flop_counts()
        if name:
            # FlopCounterMode counts 2 per multiply-accumulate.
            macs[name] = sum(sum(inside.get(f"{root}.{path}", {}).values()) for path in changes[name]) // 2
    return macs
