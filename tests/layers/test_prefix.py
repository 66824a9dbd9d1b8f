"""Prefix reuse: the outputs of the naive loop to the bit, for the counted work, and nothing left behind."""

from __future__ import annotations

import weakref
from dataclasses import asdict

import pytest
import torch
from families.family_cases import CASE_NAMES, dense_run, example_inputs, randomise_, run, unet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import genprune as gp
from genprune.errors import GenpruneError
from genprune.families import family_of
from genprune.gates import attach_gates
from genprune.layers.prefix import changed_outputs
from genprune.layers.scoring_costs import reuse_costs
from genprune.layers.swapping import removal, swapped

REMOVABLE = ("branch", "block", "wrapper")


def removals(model, sites=None):
    sites = gp.find_sites(model) if sites is None else sites
    return {name: removal(model, site) for name, site in sites.items() if site.kind in REMOVABLE}


def naive(model, inputs, change, base=None):
    with swapped(model, base or {}), swapped(model, change), torch.no_grad():
        return model(inputs) if isinstance(inputs, torch.Tensor) else run(model, inputs)


def check(model, inputs, changes, base=None):
    """Reuse gives what the naive loop gives, in the order of its own; returns the outputs."""
    outputs = list(changed_outputs(model, inputs, changes, base=base or {}))
    assert outputs[0][0] == "" and sorted(name for name, _ in outputs[1:]) == sorted(changes)
    for name, output in outputs:
        assert torch.equal(output, naive(model, inputs, changes.get(name, {}), base)), name
    return dict(outputs)


@pytest.mark.parametrize("name", CASE_NAMES)
def test_reuse_equals_the_naive_loop_for_the_counted_work(name):
    dense = dense_run(name)
    model = dense.copy()
    changes = removals(model, dense.sites)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    modules = [id(m) for m in model.modules()]
    outputs = check(model, dense.inputs, changes)
    assert torch.equal(outputs[""], dense.output)
    assert all((output - dense.output).abs().max() > 1e-4 for name, output in outputs.items() if name)
    assert [id(m) for m in model.modules()] == modules
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks

    case = dense.case
    text = {} if family_of(model).library == "timm" else {"text_length": 5}
    point = family_of(model).operating_point(model, height=case.height, width=case.width, batch=2, **text)
    expected = reuse_costs(model, gp.count_costs(model, **asdict(point)), changes, dense.inputs)
    assert expected[1] < 0.75 * expected[0]
    small = len(changes) <= 12  # the naive loop is counted where it is short
    for reuse, macs in zip((False, True) if small else (True,), expected if small else expected[1:]):
        counter = FlopCounterMode(display=False)
        with counter:
            names = [name for name, _ in changed_outputs(model, dense.inputs, changes, reuse=reuse)]
        assert counter.get_total_flops() // 2 == macs
        assert names == list(outputs)


@pytest.mark.parametrize("name", ["unet", "flux", "dit"])
def test_a_result_does_not_depend_on_the_other_changes(name):
    dense = dense_run(name)
    model = dense.copy()
    changes = removals(model, dense.sites)
    together = dict(changed_outputs(model, dense.inputs, changes))
    for change in list(changes)[::7]:
        alone = dict(changed_outputs(model, dense.inputs, {change: changes[change]}))
        assert torch.equal(alone[change], together[change])


@pytest.mark.parametrize("name", ["unet-sdxl", "sd3-dual", "dit", "vit"])
def test_changes_on_top_of_others_and_of_several_sites(name):
    dense = dense_run(name)
    model = dense.copy()
    blocks = list(dense.sites.of_kind("block"))
    base = removal(model, dense.sites[blocks[0]])
    with swapped(model, base):
        sites = gp.find_sites(model)
    changes = removals(model, {n: s for n, s in sites.items() if not n.startswith(blocks[0].split(":")[0])})
    names = list(changes)
    changes["two"] = changes[names[0]] | changes[names[-1]]
    outputs = check(model, dense.inputs, changes, base)
    assert torch.equal(outputs[""], naive(model, dense.inputs, base))
    assert not torch.equal(outputs["two"], outputs[names[0]])


@pytest.mark.parametrize("name", ["unet", "flux", "dit", "pixart", "vit-packed-glu-registers"])
def test_cut_and_gated_models(name):
    dense = dense_run(name)
    source = torch.Generator().manual_seed(1)
    sites = dense.sites.of_kind("heads")
    plan = dense.plan({n: torch.arange(site.size) > 0 for n, site in sites.items()})
    cut = gp.cut(dense.copy(), plan)
    check(cut, dense.inputs, removals(cut))
    gated = dense.copy()
    gates = {n: torch.rand(site.size, generator=source) for n, site in dense.sites.items() if site.kind != "wrapper"}
    with attach_gates(gated, gates):
        outputs = check(gated, dense.inputs, removals(gated, dense.sites))
    assert not torch.allclose(outputs[""], dense.output)


def test_the_embeddings_of_a_dit_that_lost_its_first_block():
    """The host calls them at the very end, through a block that is over by then."""
    dense = dense_run("dit")
    model = dense.copy()
    gp.cut(model, dense.plan({"transformer_blocks.0:block": torch.zeros(1, dtype=torch.bool)}))
    path = "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1"
    old = model.get_submodule(path)
    torch.manual_seed(0)
    outputs = check(model, dense.inputs, {"emb": {path: nn.Linear(old.in_features, old.out_features)}})
    assert not torch.equal(outputs["emb"], outputs[""])


@pytest.mark.parametrize("name", ["unet", "flux"])
def test_a_model_with_a_lora(name):
    from peft import LoraConfig

    dense = dense_run(name)
    model = dense.copy()
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "net.2"], init_lora_weights=False))
    model.eval()
    scale = "cross_attention_kwargs" if name == "unet" else "joint_attention_kwargs"
    outputs = check(model, dense.inputs | {scale: {"scale": 0.5}}, removals(model, dense.sites))
    assert not torch.allclose(outputs[""], dense.output)


def residuals(source):
    """What a ControlNet adds to the skips and to the middle of the tiny U-Net."""
    shapes = [(16, 8, 12), (16, 8, 12), (16, 4, 6), (32, 4, 6)]
    return {
        "down_block_additional_residuals": tuple(torch.randn(2, *s, generator=source) for s in shapes),
        "mid_block_additional_residual": torch.randn(2, 32, 4, 6, generator=source),
    }


def adapter_states(source):
    """What a T2I-Adapter adds to the down blocks: the host empties this list, and adds in place."""
    states = [torch.randn(2, *shape, generator=source) for shape in ((16, 8, 12), (32, 4, 6))]
    return {"down_intrablock_additional_residuals": states}


@pytest.mark.parametrize("extra", [residuals, adapter_states])
def test_extra_inputs_of_a_unet(extra):
    dense = dense_run("unet")
    model, source = dense.copy(), torch.Generator().manual_seed(5)
    given = extra(source)
    changes = removals(model, dense.sites)
    sizes = {name: len(value) for name, value in given.items()}
    outputs = dict(changed_outputs(model, dense.inputs | given, changes))
    for name, output in outputs.items():
        fresh = {key: list(value) if isinstance(value, list) else value for key, value in given.items()}
        assert torch.equal(output, naive(model, dense.inputs | fresh, changes.get(name, {})))
    assert {name: len(value) for name, value in given.items()} == sizes
    assert not torch.allclose(outputs[""], dense.output)


def test_a_class_conditional_unet():
    dense = dense_run("unet")
    torch.manual_seed(0)
    model = randomise_(unet(num_class_embeds=4))
    inputs = example_inputs(model, dense.case) | {"class_labels": torch.tensor([1, 3])}
    check(model, inputs, removals(model))


def test_outputs_that_are_edited_in_place():
    """By what stands in, and by who gets the results: neither reaches another result."""
    dense = dense_run("unet")
    model, block = dense.copy(), "mid_block.attentions.0.transformer_blocks.0"
    changes = removals(model, dense.sites)
    changes |= {
        f"relu {index}": {f"{path}.nonlinearity": nn.ReLU(inplace=True)}
        for index, path in enumerate(("down_blocks.1.resnets.0", "mid_block.resnets.1", "up_blocks.1.resnets.0"))
    }
    changes["in place"] = {f"{block}.norm2": Halved()}
    changes["later"] = removal(model, dense.sites[f"{block}.ff:branch"])
    expected = {name: naive(model, dense.inputs, change) for name, change in changes.items()}
    for name, output in changed_outputs(model, dense.inputs, changes):
        if name:
            assert torch.equal(output, expected[name]), name
        output.zero_()


class Halved(nn.Module):
    """A stand-in that edits what it is given: in place of a norm, the residual stream."""

    def forward(self, hidden_states):
        return hidden_states.mul_(0.5)


class Twice(nn.Module):
    """Runs one module twice and one through two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.alias = self.second
        self.tail = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x):
        x = self.second(self.first(self.first(x).relu_()))
        return self.tail(self.last(self.alias(x)) + x)


def test_modules_that_run_twice_or_have_two_names():
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(3, 4)
    paths = ("first", "second", "alias", "last", "tail", "tail.0", "tail.1", "tail.2")
    changes = {path: {path: nn.Linear(4, 4)} for path in paths}
    outputs = check(model, x, changes)
    assert all(not torch.equal(outputs[name], outputs[""]) for name in changes)
    assert list(outputs)[-1] == "tail.2"


class EditedInside(nn.Module):
    """A module edits what another returned, and the host reads that again; a third returns one tensor twice."""

    def __init__(self):
        super().__init__()
        self.first, self.activation, self.second, self.last = (nn.Linear(4, 4) for _ in range(4))
        self.activation, self.both = nn.ReLU(inplace=True), Both()

    def forward(self, x):
        x = self.first(x)
        left, right = self.both(self.second(self.activation(x)))
        left += 1  # right too
        return self.last(left) + x + right


class Both(nn.Module):
    def forward(self, x):
        return x, (x[:, :],)[0]


def test_edits_inside_modules_that_would_be_recalled():
    torch.manual_seed(0)
    model, x = EditedInside().eval(), torch.randn(3, 4)
    changes = {path: {path: nn.Linear(4, 4)} for path in ("first", "activation", "second", "last")}
    check(model, x, changes)


def test_the_model_is_its_own_between_results_and_after_an_early_end():
    dense = dense_run("unet")
    model = dense.copy()
    modules = [id(module) for module in model.modules()]
    outputs = changed_outputs(model, dense.inputs, removals(model, dense.sites), base={"conv_act": nn.Identity()})
    for _ in range(3):
        next(outputs)
        assert [id(module) for module in model.modules()] == modules and torch.is_grad_enabled()
    outputs.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_inference_mode_and_gradients():
    dense = dense_run("unet")
    model = dense.copy()
    changes = dict(list(removals(model, dense.sites).items())[:4])
    expected = dict(changed_outputs(model, dense.inputs, changes))
    with torch.inference_mode():
        inputs = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in dense.inputs.items()}
        found = dict(changed_outputs(model, inputs, changes))
    assert all(torch.equal(found[name], output) and not output.requires_grad for name, output in expected.items())


class PassedOn(nn.Module):
    """A module returns what it was given: made in inference mode, a tensor does not tell whether it was edited."""

    def __init__(self):
        super().__init__()
        self.same, self.first, self.last = nn.Identity(), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.first(self.same(x)))


def test_tensors_made_in_inference_mode():
    torch.manual_seed(0)
    with torch.inference_mode():
        x = torch.randn(3, 4)
    check(PassedOn().eval(), x, {"last": {"last": nn.Linear(4, 4)}})


def test_outputs_go_when_no_change_needs_them():
    dense = dense_run("unet-sdxl")
    model = dense.copy()
    held, handles = {}, []
    for path in (
        "conv_in",
        "down_blocks.1.attentions.0.norm",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1",
    ):

        def note(module, inputs, output, path=path):
            held.setdefault(path, weakref.ref(output))

        handles.append(model.get_submodule(path).register_forward_hook(note))
    changes = removals(model, dense.sites.of_kind("branch"))
    alive = {}
    for name, _ in changed_outputs(model, dense.inputs, changes):
        alive[name] = {path for path, output in held.items() if output() is not None}
    block = "down_blocks.1.attentions.0.transformer_blocks"
    assert alive[f"{block}.0.attn1:branch"] >= {"conv_in", "down_blocks.1.attentions.0.norm"}
    assert f"{block}.0.attn1" in alive[""] and f"{block}.0.attn1" not in alive[f"{block}.1.attn1:branch"]
    assert alive["mid_block.resnets.0:branch"] == {"conv_in"}
    for handle in handles:
        handle.remove()


def test_refusals():
    dense = dense_run("dit")
    model = dense.copy()
    with pytest.raises(GenpruneError, match="empty name.*expected a text.*Name it"):
        next(changed_outputs(model, dense.inputs, {"": {}}))
    with pytest.raises(GenpruneError, match="'proj_out' is no module.*nearest name: 'proj_out_"):
        next(changed_outputs(model, dense.inputs, {"a": {"proj_out": nn.Identity()}}))
    with pytest.raises(GenpruneError, match="no change to count.*expected.*Pass"):
        reuse_costs(model, gp.count_costs(model), {}, dense.inputs)
    with pytest.raises(GenpruneError, match="returned a str.*expected a tensor.*Wrap"):
        next(changed_outputs(Text(), {"x": torch.zeros(1)}, {}))


class Text(nn.Module):
    def forward(self, x):
        return "words"


def test_no_changes_give_the_output_alone():
    dense = dense_run("dit")
    (only,) = changed_outputs(dense.model, dense.inputs, {})
    assert only[0] == "" and torch.equal(only[1], dense.output)
