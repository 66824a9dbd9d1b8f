"""IP-Adapters: as on the dense model where their attentions are whole, refused where one was cut."""

from __future__ import annotations

import copy

import pytest
import torch
from cut_models import dense, difference, inputs, run, same_state

import genprune as gp
from genprune.cutting import plan_base

IMAGE_WIDTH = 12


def adapter(model, text_width: int) -> dict:
    """A random IP-Adapter for a dense U-Net, in the layout of diffusers' files."""
    torch.manual_seed(6)
    tensors, number = {}, 1
    for name in model.attn_processors:
        if name.endswith("attn2.processor"):
            attention = model.get_submodule(name.removesuffix(".processor"))
            for part in ("to_k_ip", "to_v_ip"):
                tensors[f"{number}.{part}.weight"] = torch.randn(attention.to_q.out_features, text_width)
            number += 2
    projection = {
        "proj.weight": torch.randn(4 * text_width, IMAGE_WIDTH),
        "proj.bias": torch.randn(4 * text_width),
        "norm.weight": torch.ones(text_width),
        "norm.bias": torch.zeros(text_width),
    }
    return {"image_proj": projection, "ip_adapter": tensors}


def without(name: str, pattern: str):
    """A model without the first unit of the first site that ends so."""
    model = dense(name)
    sites = gp.find_sites(model)
    site = next(found for found in sites if found.endswith(pattern))
    return gp.cut(model, gp.PruningPlan(plan_base(model), {site: torch.arange(sites[site].size) > 0})), site


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        *(("sd", end) for end in ("attn2:heads", "attn2:branch", ":block", ":wrapper")),
        *(("flux", end) for end in ("attn:heads", ":block")),
        ("sd3", "attn:heads"),
    ],
)
def test_refused_where_an_attention_that_it_hooks_into_was_cut(name, pattern):
    model, site = without(name, pattern)
    before = copy.deepcopy(model)
    weights = adapter(dense("sd"), 24)
    with pytest.raises(gp.PlanMismatch, match=rf"cut at 1 sites \('{site}'.*dense pipeline.*protect=\("):
        model._load_ip_adapter_weights(weights if name == "sd3" else [weights])
    same_state(model, before)


@pytest.mark.parametrize("pattern", ["ff:neurons", "attn1:heads", "resnets.0:channels"])
def test_as_on_the_dense_model_where_its_attentions_are_whole(pattern):
    model, site = without("sd", pattern)
    reference = dense("sd")
    weights = adapter(reference, 24)
    given = inputs(reference) | {"added_cond_kwargs": {"image_embeds": [torch.randn(1, 1, IMAGE_WIDTH)]}}
    mask = torch.arange(gp.find_sites(dense("sd"))[site].size) > 0
    gates = gp.attach_gates(reference, {site: mask.float()})
    plain = run(reference)
    for loaded in (model, reference):
        loaded._load_ip_adapter_weights([weights])
    with gates:
        expected = run(reference, given)
    assert difference(plain, expected) > 1e-3  # the adapter is seen
    assert difference(run(model, given), expected) < 1e-5


def test_an_adapter_with_loras_needs_every_attention():
    model, site = without("sd", "attn1:heads")
    weights = adapter(dense("sd"), 24)
    weights["ip_adapter"]["0.to_k_lora.down.weight"] = torch.ones(2, 32)
    with pytest.raises(gp.PlanMismatch, match=site):
        model._load_ip_adapter_weights([weights])
