"""Logits: float32, by name, and raw on disk."""

from __future__ import annotations

import json

import pytest
import torch
from mask_cases import problem_of
from safetensors.torch import load_file, save_file
from tiny_hosts import dit as dit_model

from genprune.errors import GenpruneError, NoMatchingSites, PlanMismatch
from genprune.families import find_sites
from genprune.masks import MaskLogits
from genprune.masks.logits import check_finite


def spread(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_pitfall_10_logits_are_float32_leaves_whatever_they_come_from():
    sites = find_sites(dit_model().to(torch.bfloat16))
    for logits in (MaskLogits.filled(sites, 2.5), MaskLogits({"a": spread(3).bfloat16(), "b": spread(2).double()})):
        for values in logits.parameters():
            assert values.dtype == torch.float32 and values.requires_grad and values.is_leaf
    assert all(bool((values == 2.5).all()) for values in MaskLogits.filled(sites, 2.5).values())
    assert {name: len(v) for name, v in MaskLogits.filled(sites, 0).items()} == {n: s.size for n, s in sites.items()}


def test_they_are_copies_in_the_order_of_names():
    given = {"b": spread(2), "a": spread(3)}
    logits = MaskLogits(given)
    assert list(logits) == ["a", "b"] and [len(values) for values in logits.parameters()] == [3, 2]
    given["a"].zero_()
    assert logits["a"].any()
    detached = logits.detached()
    detached["b"].zero_()
    assert logits["b"].any() and not detached["a"].requires_grad


def test_pitfall_11_negative_logits_keep_their_order_on_disk(dit, tmp_path):
    problem = problem_of(dit)
    logits = MaskLogits({name: spread(problem.sites[name].size, i) - 3 for i, name in enumerate(problem.masked)})
    logits.save(tmp_path / "anywhere.safetensors", {"keep": 0.5, "kinds": ("heads", "neurons")})
    loaded, settings = MaskLogits.load(tmp_path / "anywhere.safetensors")
    assert settings == {"keep": 0.5, "kinds": ["heads", "neurons"]}
    assert all(torch.equal(loaded[name], logits[name]) for name in logits) and list(loaded) == list(logits)
    assert min(float(values.min()) for values in loaded.detached().values()) < -4
    for keep in (0.9, 0.8, 0.7):
        before, after = (problem_of(dit, keep).select(values.detached()) for values in (logits, loaded))
        assert all(torch.equal(before[name], after[name]) for name in before)
        clamped = problem_of(dit, keep).select({name: v.clamp(min=0) for name, v in logits.detached().items()})
        assert any(not torch.equal(before[name], clamped[name]) for name in before)  # the release's error is seen


def test_copying_checks_sites_and_sizes():
    logits = MaskLogits({"a": spread(3), "b": spread(2)})
    logits.copy_({"a": torch.ones(3), "b": torch.zeros(2)})
    assert logits["a"].tolist() == [1, 1, 1] and logits["a"].requires_grad
    with pytest.raises(PlanMismatch, match="logits are of other sites than the model's: 2 differ, such as 'b'. Load"):
        logits.copy_({"a": torch.ones(3), "c": torch.zeros(2)})
    with pytest.raises(PlanMismatch, match=r"'b' has \(5,\) logits; expected \(2,\). Load them for the model"):
        logits.copy_({"a": torch.ones(3), "b": torch.zeros(5)})


def test_foreign_tampered_and_newer_files_are_refused(tmp_path):
    good = tmp_path / "logits.safetensors"
    MaskLogits({"a": spread(300)}).save(good)
    newer, foreign, cut_off, words = (tmp_path / name for name in ("newer", "foreign", "cut_off", "words"))
    save_file(load_file(good), newer, metadata={"format_version": "7", "settings": "{}"})
    save_file(load_file(good), foreign)
    cut_off.write_bytes(good.read_bytes()[:-100])
    words.write_text(json.dumps({"a": [1, 2]}))
    with pytest.raises(PlanMismatch, match="has format 7, this genprune reads up to 1. Upgrade with `pip install -U"):
        MaskLogits.load(newer)
    for path in (foreign, cut_off, words, tmp_path / "missing"):
        with pytest.raises(PlanMismatch, match=f"'{path}' holds no mask logits .*written by MaskLogits.save"):
            MaskLogits.load(path)
    before = good.read_bytes()
    with pytest.raises(TypeError):
        MaskLogits({"a": spread(3)}).save(good, {"bad": object()})
    assert good.read_bytes() == before and len(list(tmp_path.iterdir())) == 5  # nothing half written is left


def test_no_site_and_values_that_are_not_finite():
    with pytest.raises(NoMatchingSites, match="no site to learn a mask for; expected at least one"):
        MaskLogits({})
    check_finite({"a": torch.zeros(2)}, 3)
    with pytest.raises(GenpruneError, match="logits of 'b' are not finite after step 3; expected finite ones. Lower"):
        check_finite({"a": torch.zeros(2), "b": torch.tensor([0.0, float("nan")])}, 3)
