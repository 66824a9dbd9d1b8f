"""Candidates: how they are written, loaded, told apart."""

from __future__ import annotations

import pytest
import torch

from genprune.bench import BadCandidate, Candidate, read_candidates
from genprune.bench.candidate import fingerprint


def test_specifications(tmp_path):
    assert Candidate.parse("dense=some/folder") == Candidate("dense", model="some/folder")
    assert Candidate.parse("a.b-1=org/name@plan") == Candidate("a.b-1", model="org/name", plan="plan")
    odd = tmp_path / "folder@home"
    odd.mkdir()
    assert Candidate.parse(f"x={odd}") == Candidate("x", model=str(odd))  # an existing path is a path


@pytest.mark.parametrize("text", ["folder", "=folder", "name=", "name=base@", "name=@plan"])
def test_refuses_other_specifications(text):
    with pytest.raises(BadCandidate, match="is no candidate, expected NAME=FOLDER, NAME=HUB_ID or NAME=BASE@PLAN"):
        Candidate.parse(text)


def test_names_are_folder_names_and_differ(pipeline):
    with pytest.raises(BadCandidate, match=r"'\.\./up' is no candidate name"):
        Candidate.parse("../up=folder")
    with pytest.raises(BadCandidate, match=r"\['a', 'a'\], expected at least one and every name once"):
        read_candidates(["a=x", "a=y"])
    with pytest.raises(BadCandidate, match="needs either a folder or hub id, or a loaded pipeline"):
        Candidate("a")
    (entry,) = read_candidates({"mine": pipeline})
    assert entry.load() is pipeline


def test_loads_in_the_asked_precision_and_says_what_is_missing(folders, tmp_path):
    loaded = Candidate("dense", model=str(folders["dense"])).load("bfloat16")
    assert {p.dtype for p in loaded.unet.parameters()} == {torch.bfloat16}
    with pytest.raises(BadCandidate, match="has no model_index.json.*NAME=BASE@PLAN"):
        Candidate("dense", model=str(tmp_path)).load()


def test_loads_a_base_with_a_plan(folders, tmp_path):
    import genprune

    base = Candidate("dense", model=str(folders["dense"])).load()
    name, site = next((n, s) for n, s in genprune.find_sites(base.unet).items() if s.kind == "neurons")
    keep = torch.arange(site.size) % 2 == 0
    plan = genprune.PruningPlan(base=genprune.make_plan(base.unet, genprune.Random(keep=0.99)).base, keep={name: keep})
    plan.save(tmp_path / "plan")
    cut = Candidate.parse(f"cut={folders['dense']}@{tmp_path / 'plan'}").load()
    assert genprune.count_costs(cut.unet).params < genprune.count_costs(base.unet).params


def test_fingerprint_tells_models_apart(pipeline, folders):
    from diffusers import StableDiffusionPipeline

    again = StableDiffusionPipeline.from_pretrained(folders["dense"])
    assert fingerprint(again) == fingerprint(pipeline)
    again.vae.decoder.conv_in.bias.data[0] += 1
    assert fingerprint(again) != fingerprint(pipeline)
