"""A plan that a stock configuration can say is exported as one: stock class, renamed weights, the same output."""

from __future__ import annotations

import json

import pytest
import torch
from family_cases import dense_run, difference, run, unet, vit, vit_packed_glu, vit_split_glu

from genprune.cutting import cut
from genprune.families import StockExport, family_of

GONE = torch.tensor([False])

# Case -> blocks that go, and what the stock configuration must say then.
DEPTHS = {
    "flux": (
        ("transformer_blocks.0", "single_transformer_blocks.1"),
        {"num_layers": 1, "num_single_layers": 1},
    ),
    "sd3": (("transformer_blocks.1",), {"num_layers": 2, "dual_attention_layers": []}),
    "sd3-dual": (("transformer_blocks.0",), {"num_layers": 2, "dual_attention_layers": [0]}),
    "dit": (("transformer_blocks.1",), {"num_layers": 2}),
    "pixart": (("transformer_blocks.0",), {"num_layers": 2}),
    "vit": (("blocks.0",), {"architecture": "vit_tiny_patch16_224"}),
    "unet": (
        ("mid_block.attentions.0.transformer_blocks.0", "up_blocks.1.attentions.1.transformer_blocks.0"),
        {
            "transformer_layers_per_block": [[1], [0]],
            "reverse_transformer_layers_per_block": [1, [1, 0]],
        },
    ),
    "unet-sdxl": (
        ("up_blocks.0.attentions.1.transformer_blocks.0",),
        {
            "transformer_layers_per_block": [1, [2]],
            "reverse_transformer_layers_per_block": [[2, 1], 1],
        },
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", DEPTHS)
def test_depth_is_exported(name: str):
    dense = dense_run(name)
    blocks, expected = DEPTHS[name]
    keep = {f"{path}:block": GONE for path in blocks}
    small = cut(dense.copy(), dense.plan(keep))
    export = family_of(dense.model).stock_config(dense.model, dense.sites, keep)
    assert export == family_of(small).stock_config(small, dense.sites, keep)  # from the cut model as well
    assert {key: export.config[key] for key in expected} == expected
    assert_loads(export, small, dense)


def assert_loads(export: StockExport, small: torch.nn.Module, dense) -> None:
    family = family_of(dense.model)
    stock = family.build(json.loads(json.dumps(export.config))).eval()
    assert type(stock) is type(dense.model)
    renamed = {export.renamed(key): value for key, value in small.state_dict().items()}
    renamed.pop(None, None)
    stock.load_state_dict(renamed)  # strict: nothing missing, nothing left over
    assert torch.equal(run(stock, dense.inputs), run(small, dense.inputs))


def test_prefixes_do_not_run_into_each_other():
    export = StockExport({}, {"blocks.1.": None, "blocks.2.": "blocks.1."})
    assert export.renamed("blocks.1.norm.weight") is None
    assert export.renamed("blocks.2.norm.weight") == "blocks.1.norm.weight"
    assert export.renamed("blocks.10.norm.weight") == "blocks.10.norm.weight"


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "vit-packed-glu-registers", "vit-distilled-split-glu"])
def test_one_mlp_width_is_exported(name: str):
    dense = dense_run(name)
    keep = {site: torch.arange(dense.sites[site].size) % 3 > 0 for site in dense.sites.of_kind("neurons")}
    keep["blocks.1:block"] = GONE
    small = cut(dense.copy(), dense.plan(keep))
    assert_loads(family_of(dense.model).stock_config(dense.model, dense.sites, keep), small, dense)


@pytest.mark.parametrize(
    ("name", "removed"),
    [
        ("flux", "transformer_blocks.0.attn:branch"),
        ("sd3", "transformer_blocks.0.norm1:modulation"),
        ("dit", "transformer_blocks.0:block"),  # its embeddings serve the host's output
        ("pixart", "transformer_blocks.0.attn2:branch"),
        ("vit", "blocks.0.mlp:branch"),
        ("vit", "blocks.0.mlp:neurons"),  # one block narrower than the other
        ("unet", "mid_block.attentions.0:wrapper"),
        ("unet-sdxl", "down_blocks.1.attentions.0.transformer_blocks.1:block"),  # shares its entry with the middle
        ("unet", "down_blocks.1.resnets.0:branch"),  # without its partner on the way up
        ("unet", "up_blocks.0.resnets.0:branch"),
        ("unet", "mid_block.resnets.0:branch"),
        ("unet-unconditional", "mid_block.resnets.0:branch"),
    ],
)
def test_what_no_stock_configuration_says_is_not_exported(name: str, removed: str):
    dense = dense_run(name)
    keep = {removed: torch.zeros(dense.sites[removed].size, dtype=torch.bool)}
    assert family_of(dense.model).stock_config(dense.model, dense.sites, keep) is None


@torch.no_grad()
@pytest.mark.parametrize("build", [unet, vit, vit_packed_glu, vit_split_glu])
def test_a_family_builds_the_dense_model_again_from_json(build):
    model = build().eval()
    family = family_of(model)
    again = family.build(json.loads(json.dumps(family.config(model))))
    again.load_state_dict(model.state_dict())
    assert json.dumps(family.config(again)) == json.dumps(family.config(model))


def test_dense_output_of_the_export_differs():
    dense = dense_run("flux")
    small = cut(dense.copy(), dense.plan({"transformer_blocks.0:block": GONE}))
    with torch.no_grad():
        assert difference(dense.output, run(small, dense.inputs)) > 1e-2
