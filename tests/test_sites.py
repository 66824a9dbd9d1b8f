"""Sites as data: selection by name and kind, parents, printing, and what an error says."""

from __future__ import annotations

import pytest
import torch

from genprune.errors import NoMatchingSites
from genprune.sites import KINDS, GatePoint, Replacement, Site, Sites, Slice, effective_keep, kept_entries


def site(path: str, kind: str, size: int = 1, parent: str | None = None, **more) -> Site:
    return Site(path=path, kind=kind, size=size, gates=(GatePoint(path),), parent=parent, **more)


@pytest.fixture
def sites() -> Sites:
    return Sites.of(
        "Host",
        [
            site("blocks.0.attn", "heads", 4, "blocks.0.attn:branch"),
            site("blocks.0.attn", "branch", 1, "blocks.0:block"),
            site("blocks.0", "block"),
            site("blocks.1.attn", "heads", 6, "blocks.1:block"),
            site("blocks.1", "block"),
        ],
        {"blocks.1.mlp:neurons": "'blocks.1.mlp.norm' stands in between"},
    )


def test_sites_are_a_mapping_in_module_order(sites: Sites):
    assert list(sites)[:2] == ["blocks.0.attn:heads", "blocks.0.attn:branch"]
    assert len(sites) == 5 and sites["blocks.1.attn:heads"].size == 6
    assert "blocks.1:block" in sites and "blocks.2:block" not in sites


def test_kinds_go_from_fine_to_coarse(sites: Sites):
    assert sites.kinds() == ("heads", "branch", "block")
    assert KINDS == ("heads", "neurons", "channels", "modulation", "branch", "block", "wrapper")


def test_match_takes_patterns_and_names(sites: Sites):
    assert list(sites.match("*attn:heads")) == ["blocks.0.attn:heads", "blocks.1.attn:heads"]
    assert list(sites.match("blocks.1:block", "blocks.0.attn:*")) == [
        "blocks.0.attn:heads",
        "blocks.0.attn:branch",
        "blocks.1:block",
    ]
    assert sites.match("*").refused == sites.refused


def test_of_kind_selects(sites: Sites):
    assert list(sites.of_kind("block", "branch")) == ["blocks.0.attn:branch", "blocks.0:block", "blocks.1:block"]


def test_nothing_matched_is_an_error_with_the_nearest_name(sites: Sites):
    text = (
        r"no site matches 'blocks.1.attm:heads' in Host \(5 sites, nearest name: 'blocks.1.attn:heads'\).*find_sites"
    )
    with pytest.raises(NoMatchingSites, match=text):
        sites.match("*:heads", "blocks.1.attm:heads")
    with pytest.raises(NoMatchingSites, match=text):
        sites["blocks.1.attm:heads"]


def test_an_unknown_kind_names_those_that_are_there(sites: Sites):
    with pytest.raises(NoMatchingSites, match="no site of kind 'head' in Host; it has heads, branch, block. Pass one"):
        sites.of_kind("head")


def test_a_refused_site_says_why(sites: Sites):
    with pytest.raises(NoMatchingSites, match="'blocks.1.mlp:neurons' cannot be cut: 'blocks.1.mlp.norm' stands in"):
        sites["blocks.1.mlp:neurons"]


def test_ancestors_are_nearest_first(sites: Sites):
    assert sites.ancestors("blocks.0.attn:heads") == ["blocks.0.attn:branch", "blocks.0:block"]
    assert sites.ancestors("blocks.1:block") == []


def test_printing_counts_sites_and_units(sites: Sites):
    assert str(sites).splitlines() == [
        "Host: 5 sites",
        "  heads          2 sites        10 units",
        "  branch         1 sites         1 units",
        "  block          2 sites         2 units",
        "  refused    blocks.1.mlp:neurons: 'blocks.1.mlp.norm' stands in between",
    ]


def test_effective_keep_leaves_out_what_changes_nothing(sites: Sites):
    keep = {
        "blocks.0.attn:heads": torch.tensor([True, False, True, True]),  # inside a removed block
        "blocks.0:block": torch.tensor([False]),
        "blocks.1.attn:heads": torch.ones(6, dtype=torch.bool),
    }
    assert list(effective_keep(sites, keep)) == ["blocks.0:block"]


def test_slices_outside_of_a_replacement_follow_a_site_that_is_emptied():
    single = site("block.attn", "heads", 2, emptied=(Replacement("block.attn", lambda module: module),))
    assert single.shrinks("block.attn.to_q", kept=1)
    assert not single.shrinks("block.attn.to_q", kept=0)
    assert not single.shrinks("block.attn", kept=0)
    assert single.shrinks("block.attn_out", kept=0)  # a longer name, not a part of it
    assert single.shrinks("block.proj_out", kept=0)


def test_kept_entries_of_a_packed_layer():
    heads, neurons = torch.tensor([True, False]), torch.tensor([False, True, True])
    mask = kept_entries(
        torch.ones(8, dtype=torch.bool),
        [(Slice("layer", "in", width=2), heads), (Slice("layer", "in", offset=4), neurons)],
    )
    assert mask.tolist() == [True, True, False, False, False, True, True, True]
