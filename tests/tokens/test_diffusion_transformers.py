"""Image tokens of DiT, PixArt, SD3 and FLUX: against a run of the host's own blocks on gathered tokens."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from token_denoisers import FAMILIES, TRANSFORMERS, denoiser, guided, hooks_on, inputs_of, run
from torch import nn
from torch.overrides import TorchFunctionMode

import genprune as gp
from genprune.tokens.diffusion import DiffusionTokens
from genprune.tokens.stream_hooks import rotated

TEXT = dict.fromkeys(TRANSFORMERS, {"text_length": 5}) | {"dit": {}}
DROP = gp.ZeroTPrune(score="vote", similarity_share=0.3, reduce="drop", layers=(0,))


def half(**settings) -> DiffusionTokens:
    return DiffusionTokens(DROP, tokens=0.5, **{"operating_point": None, **settings})


class AttentionCalls(TorchFunctionMode):
    """Lengths of the queries of every fused attention."""

    def __init__(self):
        self.lengths = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            self.lengths.append(query.shape[2])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_is_the_same_to_the_bit_and_removal_leaves_nothing(family):
    model = denoiser(family)
    inputs = inputs_of(model, family)
    dense, before = run(model, inputs), hooks_on(model)
    keys = list(model.state_dict())
    handle = gp.prune_tokens(model, gp.ZeroTPrune(keep=1.0))
    assert torch.equal(run(model, inputs), dense)
    handle.use(half() if family in TRANSFORMERS else DiffusionTokens(gp.ZeroTPrune(), tokens=0.5))
    assert (run(model, inputs) - dense).abs().max() > 1e-2 * dense.std()
    assert list(model.state_dict()) == keys
    handle.remove()
    handle.remove()
    assert torch.equal(run(model, inputs), dense)
    assert hooks_on(model) == before, "row 18"


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_stays_fused_and_gets_fewer_tokens(family):
    model = denoiser(family)
    inputs = inputs_of(model, family)
    with AttentionCalls() as dense:
        run(model, inputs)
    with gp.prune_tokens(model, DiffusionTokens(gp.ZeroTPrune(), tokens=0.5)), AttentionCalls() as short:
        run(model, inputs)
    assert len(short.lengths) == len(dense.lengths) > 0
    assert sum(short.lengths) < 0.9 * sum(dense.lengths)


def _reference(model: nn.Module, family: str, inputs: dict, kept: torch.Tensor, restore: str) -> torch.Tensor:
    """One row: the host's blocks after the first on gathered tokens and embeddings, its own forward around them.

    `kept` are the places that the first block hands on. Blocks are replaced by functions of this test for one call.
    """
    paths = [
        f"{name}.{i}"
        for name in ("transformer_blocks", "single_transformer_blocks")
        for i in range(len(getattr(model, name, ())))
    ]
    held = {}

    class Short(nn.Module):
        def __init__(self, block, last):
            super().__init__()
            self.block, self.last = block, last
            self.norm1 = getattr(block, "norm1", None)  # DiT reads its embeddings
            self.context_pre_only = getattr(block, "context_pre_only", False)

        def forward(self, hidden_states, *args, **kwargs):
            short = held.pop("short") if "short" in held else hidden_states[:, kept]
            held.setdefault("removed", hidden_states)
            if kwargs.get("image_rotary_emb") is not None:
                text = kwargs["encoder_hidden_states"].shape[1]
                index = torch.cat([torch.arange(text), kept + text])
                kwargs["image_rotary_emb"] = tuple(part[index] for part in kwargs["image_rotary_emb"])
            found = self.block(hidden_states=short, **kwargs) if not args else self.block(short, *args, **kwargs)
            short = found[1] if isinstance(found, tuple) else found
            full = held["removed"].clone() if restore == "own" else torch.zeros_like(held["removed"])
            full[:, kept] = short
            held["short"] = short
            full = full if self.last else hidden_states
            return (found[0], full) if isinstance(found, tuple) else full

    twin = copy.deepcopy(model)
    for path in paths[1:]:
        parent, _, name = path.rpartition(".")
        setattr(twin.get_submodule(parent), name, Short(twin.get_submodule(path), path == paths[-1]))
    return run(twin, inputs)


@pytest.mark.parametrize("restore", ["own", "zeros"])
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_the_rest_of_the_model_runs_on_the_tokens_that_stay(family, restore):
    model = denoiser(family)
    inputs = inputs_of(model, family, batch=1)
    handle = gp.prune_tokens(model, half(restore=restore))
    found = run(model, inputs)
    kept = handle._host.steps.chosen[0].choice.kept[0]
    handle.remove()
    expected = _reference(model, family, inputs, kept, restore)
    assert torch.allclose(found, expected, atol=1e-5), (found - expected).abs().max()
    assert not torch.allclose(expected, run(model, inputs), atol=1e-2)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_rows_are_independent_of_each_other(family):
    """Rows keep other tokens, and each has the rotary embedding of its own."""
    model = denoiser(family)
    inputs = inputs_of(model, family, batch=2)
    rows = [{k: v[i : i + 1] if k not in ("img_ids", "txt_ids") else v for k, v in inputs.items()} for i in range(2)]
    with gp.prune_tokens(model, half()) as handle:
        together = run(model, inputs)
        kept = handle._host.steps.chosen[0].choice.kept
        assert not torch.equal(kept[0], kept[1])
        apart = torch.cat([run(model, row) for row in rows])
    assert torch.allclose(together, apart, atol=1e-5)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_scores_are_those_of_the_attention_between_image_tokens(family):
    """Votes from queries and keys of the host's processor, rotated by the host's own function."""
    from diffusers.models.embeddings import apply_rotary_emb

    model = denoiser(family)
    inputs = inputs_of(model, family, batch=1)
    method = gp.ZeroTPrune(score="vote", similarity_share=0.0, reduce="drop", layers=(0,), head_filter=None)
    attention, seen = model.transformer_blocks[0].attn, {}
    hooks = [
        getattr(attention, name).register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o))
        for name in ("norm_q", "norm_k")
    ]
    hooks.append(
        model.transformer_blocks[0].register_forward_pre_hook(
            lambda m, i, k: seen.__setitem__("rope", k.get("image_rotary_emb")), with_kwargs=True
        )
    )
    with gp.prune_tokens(model, DiffusionTokens(method, tokens=0.5)) as handle:
        run(model, inputs)
        kept = handle._host.steps.chosen[0].choice.kept[0]
    for hook in hooks:
        hook.remove()
    query, key = seen["norm_q"], seen["norm_k"]
    if family == "flux":
        rope = tuple(part[5:] for part in seen["rope"])  # after 5 text tokens
        turned = apply_rotary_emb(query, rope, sequence_dim=1)
        assert torch.allclose(rotated(query, rope), turned) and not torch.allclose(turned, query)
        query, key = (apply_rotary_emb(x, rope, sequence_dim=1).transpose(1, 2) for x in (query, key))
    votes = (query.double() @ key.double().mT * query.shape[-1] ** -0.5).softmax(-1).sum(-2)[0]  # (H, n)
    best = votes.square().mean(0).sqrt().topk(len(kept)).indices.sort().values
    assert torch.equal(kept, best)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_halves_of_guidance_share_their_tokens(family):
    model = denoiser(family)
    with gp.prune_tokens(model, DiffusionTokens(gp.ZeroTPrune(), tokens=0.5)) as handle:
        run(model, guided(model, family))
        steps = handle._host.steps
        for known in steps.chosen.values():
            kept = known.choice.kept
            assert torch.equal(kept[:2], kept[2:]) and not torch.equal(kept[0], kept[1])
        handle.set(guidance="apart")
        run(model, guided(model, family))
        assert not steps.chosen, "nothing is remembered that nobody needs"


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_schedule_and_reuse(family):
    model = denoiser(family)
    inputs = inputs_of(model, family)
    unit = 1000 if family == "flux" else 1
    lengths = []
    settings = DiffusionTokens(gp.ZeroTPrune(), tokens=0.5, early=((0.5, 0.0),), every=2)
    with gp.prune_tokens(model, settings) as handle:
        for timestep in (900, 600, 400, 200, 900):
            with AttentionCalls() as calls:
                run(model, inputs | {"timestep": torch.full_like(inputs["timestep"], timestep / unit)})
            lengths.append(sum(calls.lengths))
            if timestep == 400:
                chosen = dict(handle._host.steps.chosen)
            if timestep == 200:
                assert handle._host.steps.chosen.keys() == chosen.keys()
                assert all(handle._host.steps.chosen[n].choice is chosen[n].choice for n in chosen)
    assert lengths[0] == lengths[1] == lengths[4] > lengths[2] >= lengths[3]
    if family in ("sd", "sdxl"):
        assert lengths[3] < lengths[2], "the block that scores runs on fewer tokens too"


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_budget_report_and_other_sizes(family):
    model = denoiser(family)
    settings = DiffusionTokens(gp.ZeroTPrune(keep=0.8), operating_point={"height": 16, "width": 16, **TEXT[family]})
    with gp.prune_tokens(model, settings) as handle:
        report = handle.report()
        assert 0.76 < report.keep <= 0.81 and report.patches[0] == 64
        assert handle.set(keep=0.9).report().keep > report.keep
        assert run(model, inputs_of(model, family)).shape == run(denoiser(family), inputs_of(model, family)).shape


@pytest.mark.parametrize("family", FAMILIES)
def test_called_by_place_and_after_an_aborted_call(family):
    model = denoiser(family)
    inputs = inputs_of(model, family, batch=1)
    with gp.prune_tokens(model, DiffusionTokens(gp.ZeroTPrune(), tokens=0.5)):
        found = run(model, inputs)
        name = "sample" if family in ("sd", "sdxl") else "hidden_states"
        rest = {key: value for key, value in inputs.items() if key != name}
        with torch.no_grad():
            assert torch.equal(model(inputs[name], **rest, return_dict=False)[0], found)
        aborted = next(m for n, m in model.named_modules() if n.endswith(("ff", "proj_mlp"))).register_forward_hook(
            _stop
        )
        with pytest.raises(KeyboardInterrupt):
            run(model, inputs)
        aborted.remove()
        assert torch.equal(run(model, inputs), found)


def _stop(module, inputs, output):
    raise KeyboardInterrupt


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_pickles_reduce_by_themselves(family):
    model = denoiser(family)
    inputs = inputs_of(model, family)
    handle = gp.prune_tokens(model, DiffusionTokens(gp.ZeroTPrune(), tokens=0.5))
    found = run(model, inputs)
    twin, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    handle.remove()
    dense = run(model, inputs)
    for other in (twin, thawed):
        assert torch.equal(run(other, inputs), found)
    assert not torch.equal(found, dense)


@pytest.mark.parametrize("family", ["flux"])
def test_compiles_as_one_graph(family):
    model = denoiser(family)
    inputs = inputs_of(model, family)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        dense = compiled(**inputs, return_dict=False)[0]  # what was compiled before has no hooks
        with gp.prune_tokens(model, half(guidance="shared")):
            expected = run(model, inputs)
            assert torch.allclose(compiled(**inputs, return_dict=False)[0], expected, atol=1e-5)
            assert not torch.allclose(dense, expected, atol=1e-3)
        assert torch.equal(compiled(**inputs, return_dict=False)[0], dense)
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["dit", "sd3"])
def test_gradients_flow_with_and_without_checkpointing(family):
    model = denoiser(family).train()
    inputs = inputs_of(model, family)
    with gp.prune_tokens(model, half()):
        gradients = []
        for checkpointed in (False, True):
            (model.enable_gradient_checkpointing if checkpointed else model.disable_gradient_checkpointing)()
            model.zero_grad()
            model(**inputs, return_dict=False)[0].square().mean().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[0].abs().sum() > 0
    assert torch.allclose(*gradients, atol=1e-6)


def test_a_mask_of_the_self_attention_is_gathered():
    model = denoiser("pixart")
    inputs = inputs_of(model, "pixart")
    mask, seen = torch.ones(2, 48), []
    mask[:, ::3] = 0
    with gp.prune_tokens(model, half()) as handle:
        hook = model.transformer_blocks[1].attn1.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
        run(model, inputs | {"attention_mask": mask})
        hook.remove()
        kept = handle._host.steps.chosen[0].choice.kept
    expected = (1 - mask).gather(1, kept) * -10000.0
    assert 0 < (expected == 0).sum() < expected.numel()
    assert torch.equal(seen[0][:, 0], expected)


@pytest.mark.parametrize(
    ("family", "name", "count"),
    [("flux", "controlnet_block_samples", 2), ("flux", "controlnet_single_block_samples", 2),
     ("sd3", "block_controlnet_hidden_states", 3)],
)  # fmt: skip
def test_residuals_of_a_controlnet_meet_the_full_grid(family, name, count):
    model = denoiser(family)
    inputs = inputs_of(model, family)
    width, tokens = (24, 48)
    zeros = [torch.zeros(2, tokens, width)] * count
    some = [torch.randn(2, tokens, width)] * count
    with gp.prune_tokens(model, half(restore="own")) as handle:
        plain = run(model, inputs)
        assert torch.allclose(run(model, inputs | {name: zeros}), plain, atol=1e-5)
        assert not torch.allclose(run(model, inputs | {name: some}), plain, atol=1e-2)
        handle.set(restore="update")
        plain = run(model, inputs)
        assert torch.allclose(run(model, inputs | {name: zeros}), plain, atol=1e-5)


def test_skipped_layers_of_sd3():
    model = denoiser("sd3")
    inputs = inputs_of(model, "sd3")
    with gp.prune_tokens(model, half()):
        whole = run(model, inputs)
        for layer in (0, 1, 2):
            found = run(model, inputs | {"skip_layers": [layer]})
            assert found.shape == whole.shape and not torch.equal(found, whole)


def test_what_cannot_work_is_refused():
    model = denoiser("flux")
    inputs = inputs_of(model, "flux")
    with gp.prune_tokens(model, half()):
        with pytest.raises(gp.UnsupportedModel, match="ip_hidden_states.*handle.remove"):
            run(model, inputs | {"joint_attention_kwargs": {"ip_hidden_states": [torch.zeros(2, 1, 4, 24)]}})
        with pytest.raises(gp.GenpruneError, match="reduced already"):
            gp.prune_tokens(model, half())
    with pytest.raises(gp.NoMatchingSites, match="no layer 40"):
        gp.prune_tokens(model, gp.ZeroTPrune(keep={40: 0.5}))
    assert not hooks_on(model)
    with pytest.raises(gp.BudgetUnreachable):
        gp.prune_tokens(model, gp.ZeroTPrune(keep=0.01))
    handle = gp.prune_tokens(model, half())
    with pytest.raises(gp.GenpruneError):
        handle.set(keep=0.01)
    assert handle.settings == half()
    handle.remove()


def test_fused_projections_are_named():
    model = denoiser("dit")
    inputs = inputs_of(model, "dit")
    for block in model.transformer_blocks:
        block.attn1.fuse_projections()
    from diffusers.models.attention_processor import FusedAttnProcessor2_0

    for block in model.transformer_blocks:
        block.attn1.set_processor(FusedAttnProcessor2_0())
    with gp.prune_tokens(model, half()), pytest.raises(gp.UnsupportedModel, match="unfuse_qkv_projections"):
        run(model, inputs)


def test_settings_for_denoisers_are_refused_elsewhere():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=3)
    with pytest.raises(gp.UnsupportedModel, match="no denoiser"):
        gp.prune_tokens(model, half())
