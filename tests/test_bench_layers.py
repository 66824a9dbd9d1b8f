"""The comparison of layer methods: its milestones, its spread of loss terms, and the page it writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.bench_layers import parse, spread_of_terms  # noqa: E402
from scripts.ecodiff.bases import bases  # noqa: E402
from scripts.layers.page import MARK, main_figures, write_page  # noqa: E402
from scripts.layers.recovering import BATCH, SEEN, milestones  # noqa: E402


def point(right: float, psnr: float) -> dict:
    return {"all_right": {"estimate": right}, "psnr": {"estimate": psnr}}


def result() -> dict:
    costs = {"dense_macs": 100, "dense_params": 10, "params": 4}
    rows = {
        "laptop-0@0.5": {
            "method": "laptop",
            "seed": 0,
            "keep": 0.5,
            "costs": {**costs, "macs": 50},
            "points": {"0": point(0.25, 12.0), "0.01": point(0.75, 20.0)},
            "terms": {"spread": 1234.0, "features_share": 0.5},
        },
        "random-1@0.75": {
            "method": "random",
            "seed": 1,
            "keep": 0.75,
            "costs": {**costs, "macs": 75},
            "points": {"0": point(0.125, 11.0)},
        },
    }
    ratio = {"laptop-0@0.5": {"estimate": 0.61}}
    part = {
        "rows": rows,
        "dense": {"all_right": {"estimate": 0.9}},
        "plans": {
            "laptop-0@0.5": {"additivity": {"true": [1, 2], "pearson": 0.9, "spearman": 0.8}, "selection": "knapsack"}
        },
        "latency": {"batch 8": {"ratio": ratio}},
    }
    vit = {
        "dense_accuracy": 0.88,
        "test_images": 100,
        "rows": {
            "laptop@0.5": {
                "method": "laptop",
                "keep": 0.5,
                "costs": {**costs, "macs": 50},
                "accuracy": {"0": 0.1, "0.05": 0.8},
            }
        },
    }
    return {"bases": {"unet": part}, "vit": vit}


def test_the_page_holds_the_rows(tmp_path):
    (tmp_path / "layers-compared.md").write_text(f"before\n{MARK[0]}\nold\n{MARK[1]}\nafter\n")
    write_page(tmp_path, result(), tmp_path / "no-grids")
    text = (tmp_path / "layers-compared.md").read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "| 50.0% | laptop | 40.0% | 12.0 / 25% |  | 20.0 / 75% |  | 0.61 |" in text
    assert "| 75.0% | random, seed 1 | 40.0% | 11.0 / 12% |" in text
    assert "Pearson 0.900, Spearman 0.800" in text and "1,234" in text
    assert "| 50.0% | laptop | 40.0% | 10.0% |  |  | 80.0% |" in text
    assert (tmp_path / "layers" / "unet.svg").stat().st_size > 1000


def test_figures_are_of_half_the_macs_and_the_first_seed():
    assert main_figures(result()["bases"]) == {
        "all_right_unet_laptop_at_0": 0.25,
        "psnr_unet_laptop_at_0": 12.0,
        "all_right_unet_laptop_at_0.01": 0.75,
        "psnr_unet_laptop_at_0.01": 20.0,
    }


@pytest.mark.parametrize("name", ["unet", "mmdit"])
def test_milestones_are_shares_of_what_the_base_saw(name):
    stops = milestones(bases()[name], 0.01)
    assert list(stops.values()) == [0.001, 0.01]
    for step, share in stops.items():
        assert abs(step * BATCH - share * SEEN[name]) <= BATCH / 2
    assert milestones(bases()[name], 0.0) == {}


def test_the_spread_compares_feature_terms_alone():
    term = lambda value: {"weighted": value}  # noqa: E731
    curve = [{"terms": {"task": term(9.0), "output": term(1.0), "a": term(2.0), "b": term(8.0)}}] * 2
    assert spread_of_terms(curve) == {"spread": 4.0, "features_share": 0.5}
    assert spread_of_terms([{"terms": {"task": term(1.0)}}]) == {}


def test_quick_is_one_base_and_a_short_recovery():
    arguments = parse(["--quick"])
    assert arguments.base == ["unet"] and arguments.most == 0.001 and arguments.work.name == "quick"
