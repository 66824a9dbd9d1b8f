"""Export what a stock configuration can say, so that it loads where genprune is not installed."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from genprune.cutting import applied_plan, pruned_ops, pruned_widths
from genprune.errors import UnsupportedModel
from genprune.families import Family, StockExport, denoiser, denoiser_slot, family_of, find_sites, host_name
from genprune.files import check_replaceable, whole_folder
from genprune.operations import effective_ops
from genprune.saving import check_ungated, save_model
from genprune.sites import effective_keep
from genprune.widths import first_units, skeleton


def export_stock(target: Any, folder: str | os.PathLike) -> Path:
    """Write a pruned model or pipeline as its stock class: blocks renumbered, genprune not needed.

    Whole transformer blocks can be said by a stock configuration in every family, one MLP width for all blocks in
    timm, and in U-Nets also layers that leave with their skip partners, the middle and the innermost stages. `target`
    itself stays as it is and shares its weights with what is written.

    Args:
        target: a model that was cut, or the pipeline that holds it.
        folder: where to; replaced as a whole where a saved model or pipeline is there.

    Returns:
        The folder's path. `from_pretrained`, or `timm.create_model("local-dir:FOLDER", pretrained=True)`, loads it.

    Raises:
        UnsupportedModel: no stock configuration says the same; the message names the first sites that are in the way.
        PlanMismatch: gates are attached, or `folder` holds something else.
    """
    model, folder = denoiser(target), Path(folder)
    check_ungated(model)
    stock = stock_model(model)
    if (slot := denoiser_slot(target)) is None:
        return save_model(stock, folder)
    check_replaceable(folder, "model_index.json")
    pipeline = copy.copy(target)  # registering the stock model on the copy leaves the caller's pipeline alone
    pipeline.register_modules(**{slot: stock})
    with whole_folder(folder) as temporary:
        pipeline.save_pretrained(temporary)
    return folder


def stock_model(model: nn.Module) -> nn.Module:
    """The stock model that computes the same as a cut one, with the same weights (not copies)."""
    family = family_of(model)
    dense = skeleton(family.build, family.config(model))
    plan = applied_plan(model)
    keep = first_units(find_sites(dense), pruned_widths(model)) if plan is None else plan.keep
    export = stock_export_of(dense, keep, pruned_ops(model))
    stock = skeleton(family.build, export.config)
    state = {export.renamed(name): value for name, value in model.state_dict().items()}
    state.pop(None, None)  # what went
    stock.load_state_dict(state, strict=True, assign=True)
    return stock.train(model.training)


def stock_export_of(
    dense: nn.Module, keep: Mapping[str, Tensor], ops: Sequence[Mapping[str, Any]] = ()
) -> StockExport:
    """The stock configuration that says the same as a plan's masks, and the names that it gives to what is left.

    Args:
        dense: the dense model, or its skeleton.
        keep, ops: as in `PruningPlan`.

    Raises:
        UnsupportedModel: there is none; the message names the first sites that are in the way.
    """
    family, sites = family_of(dense), find_sites(dense)
    ops = effective_ops(ops, sites, keep)
    export = family.stock_config(dense, sites, keep, ops)
    if export is None:
        raise UnsupportedModel(_not_stock(family, dense, sites, keep, ops))
    return export


def _not_stock(family: Family, dense: nn.Module, sites, keep, ops) -> str:
    """The message that names what a stock configuration cannot say."""
    # skips and resamplers that leave with their partners can be stock: another operator is to blame first
    if ops := [op for op in ops if op["with"] not in ("drop_skip", "drop_resampler")] or list(ops):
        return (
            f"no stock {host_name(dense)} configuration says what {len(ops)} operators compute, "
            f"'{ops[0]['with']}' at '{ops[0]['path']}' the first of them. Expected whole layers that went. Save it "
            "with pipe.save_pretrained or gp.save_model instead, and load it with genprune imported."
        )
    keep = effective_keep(sites, keep)
    kinds = {sites[name].kind for name in keep}

    def is_stock(kind: str) -> bool:
        return family.stock_config(dense, sites, {n: m for n, m in keep.items() if sites[n].kind == kind}) is not None

    # Where each kind is stock by itself, it is their combination that is not: name them all.
    in_the_way = {kind for kind in kinds if not is_stock(kind)} or kinds
    names = [name for name in keep if sites[name].kind in in_the_way]
    listed = ", ".join(f"'{n}' (keeps {int(keep[n].sum())} of {keep[n].numel()})" for n in names[:3])
    return (
        f"no stock {host_name(dense)} configuration says what this model lost: {len(names)} sites are in the way, "
        f"{listed}{', ...' if len(names) > 3 else ''}. Expected only whole blocks, as the host counts "
        f"them{', or one MLP width for all' if family.library == 'timm' else ''}. Save it with "
        "pipe.save_pretrained or gp.save_model instead, and load it with genprune imported."
    )
