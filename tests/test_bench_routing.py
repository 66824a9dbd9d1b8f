"""Pieces of scripts/bench_routing.py: retrieval, correlations, candidates, the page's tables."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from genprune import miniature  # noqa: E402
from scripts import bench_routing  # noqa: E402
from scripts.routing.candidates import BUDGETS, CANDIDATES  # noqa: E402
from scripts.routing.difficulty import correlation  # noqa: E402
from scripts.routing.measures import retrieval  # noqa: E402
from scripts.routing.page import quality_figures, write_quality  # noqa: E402


def test_retrieval_finds_the_pictures_own_captions():
    scenes = miniature.scenes("test", 24, seed=3)
    pictures = torch.stack([torch.from_numpy(miniature.render(scene).copy()).permute(2, 0, 1) for scene in scenes])
    own, others = retrieval(pictures, scenes), retrieval(pictures.roll(1, 0), scenes)
    assert own["R@1"] > 0.8 and own["R@5"] >= own["R@1"]
    assert others["R@1"] < 0.2


def test_correlation_of_ranks():
    hard = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    found = correlation([0.4, 0.4, 0.5, 0.5, 0.6, 0.6], hard)
    assert found["estimate"] > 0.9 and found["low"] <= found["estimate"] <= found["high"]
    assert correlation([0.6, 0.6, 0.5, 0.5, 0.4, 0.4], hard)["estimate"] < -0.9
    assert correlation([0.5] * 6, hard) is None


def test_candidates_are_those_of_the_comparison():
    assert len(BUDGETS) == 2
    slugs = [candidate.slug for candidate in CANDIDATES]
    assert len(set(slugs)) == len(slugs)
    assert {1, 4, 8} <= {candidate.experts for candidate in CANDIDATES if candidate.source == "router"}
    random = next(candidate for candidate in CANDIDATES if candidate.random)
    routed = next(candidate for candidate in CANDIDATES if candidate.label == "8 experts")
    assert random.router_slug == routed.router_slug


def interval(value: float) -> dict:
    return {"estimate": value, "low": value - 0.1, "high": value + 0.1}


def point(right: list[int]) -> dict:
    share = sum(right) / len(right)
    return {"all_right": interval(share), "kid": 0.1, "R@1": share, "psnr": interval(20.0), "right": right}


def row(right: list[int], **changes) -> dict:
    plain = {"params": [0.5], "shares": [0.5], "test_share": 0.5, "points": {"0": point(right), "0.05": point(right)}}
    return plain | changes


def found() -> dict:
    dense = {"all_right": interval(0.9), "kid": 0.0, "R@1": 1.0}
    routed = row(
        [1, 1, 1, 0],
        shares=[0.4, 0.6],
        difficulty={"denoising_error": {"estimate": 0.2, "low": 0.1, "high": 0.3}, "number_of_objects": None},
        map=[{"share": 0.4, "prompts": 3, "words": ["cat", "small"], "kinds": {"single": 3}}],
    )
    rows = {"EcoDiff": row([1, 0, 0, 0]), "1 expert": row([1, 1, 0, 0]), "8 experts": routed}
    return {"unet": {"dense": dense, "controls": {"blank canvas": dense}, "0.5": rows}}


def test_figures_hold_paired_differences():
    figures = quality_figures(found())
    assert figures["all_right_unet_8_experts_keep_0_5_at_0.05"] == pytest.approx(0.75)
    assert figures["less_1_expert_unet_8_experts_keep_0_5_at_0.05"] == pytest.approx(0.25)
    assert figures["less_ecodiff_unet_8_experts_keep_0_5_at_0.05"] == pytest.approx(0.5)
    assert "less_1_expert_unet_1_expert_keep_0_5_at_0.05" not in figures


def test_the_page_is_written_between_its_marks(tmp_path):
    page = tmp_path / "routing-compared.md"
    shutil.copy(ROOT / "docs" / "routing-compared.md", page)
    before = page.read_text()
    write_quality(page, found())
    text = page.read_text()
    assert "| 8 experts | 50.0% | 50 % | 75% [65, 85]" in text and "cat, small" in text
    assert "+0.20 [+0.10, +0.30]" in text and "same budget" in text
    assert text.split("## What serving costs")[1] == before.split("## What serving costs")[1]
    write_quality(page, found())
    assert page.read_text() == text


def test_quality_needs_an_encoder(capsys):
    with pytest.raises(SystemExit):
        bench_routing.parse(["--parts", "quality"])
    assert "--encoder" in capsys.readouterr().err
