"""Full-size hosts on the meta device: presets have the published sizes, and so have their stock configurations."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from preset_hosts import COUNTS
from stock_configs import SD15, SDXL

import genprune as gp
from genprune.presets import preset_cards, preset_plan
from genprune.stock import stock_export_of

DENSE = {"sd": (859_520_964, 401_636_720_640), "sdxl": (2_567_463_684, 3_380_618_199_040)}


@cache
def host(name: str) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**{"sd": SD15, "sdxl": SDXL}[name])


@pytest.mark.parametrize("name", COUNTS)
def test_published_counts(name):
    from diffusers import UNet2DConditionModel

    base = "sd" if name.startswith("bk") else "sdxl"
    model = host(base)
    plan = preset_plan(model, name)
    figures = plan.figures
    assert (figures["params"], figures["macs"]) == COUNTS[name]
    assert (figures["dense_params"], figures["dense_macs"]) == DENSE[base]
    assert plan.operating_point == {"height": 64 * (1 + (base == "sdxl")), "width": 64 * (1 + (base == "sdxl")),
                                    "text_length": 77, "batch": 1}  # fmt: skip
    export = stock_export_of(model, plan.keep, plan.ops)
    with torch.device("meta"):
        stock = UNet2DConditionModel.from_config(export.config)
    shapes = {export.renamed(key): value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in stock.state_dict().items()} == {k: v for k, v in shapes.items() if k}
    if base == "sd":
        costs = gp.count_costs(stock)
        assert (costs.params, costs.macs) == COUNTS[name]


def test_cards():
    cards = {card.name: card for card in preset_cards()}
    assert {name: card.params for name, card in cards.items()} == {
        **{name: params for name, (params, _) in COUNTS.items()},
        "alternate-layers": None,
    }
    assert "SDXL" in cards["vega"].host and "FluxTransformer2DModel" in cards["alternate-layers"].host


def test_another_operating_point():
    model = host("sd")
    plan = preset_plan(model, "bk-sdm-tiny", operating_point={"height": 32, "width": 48})
    assert plan.operating_point == {"height": 32, "width": 48, "text_length": 77, "batch": 1}
    assert plan.figures["params"] == COUNTS["bk-sdm-tiny"][0] and plan.figures["macs"] < COUNTS["bk-sdm-tiny"][1] / 2
