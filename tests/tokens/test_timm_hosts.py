"""The laws of token reduction, for each kind of timm transformer. Rows are those of the pitfalls of other codes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from token_hosts import SEQUENCES, AttentionCalls, Watched, encoder, images, sam, traces, vit

import genprune as gp
from genprune.tokens.hosts import host_of

GRIDS = {
    "sam (relative positions)": lambda: sam(use_rel_pos=True),
    "sam (rope)": lambda: sam(use_abs_pos=False, use_rope=True),
    "sam (qk norm, no neck)": lambda: sam(qk_norm=True, neck_chans=0, head_hidden_size=8),
    "qwen3 classifier": lambda: encoder("Qwen3VitClassifier"),
    "qwen3 encoder": lambda: encoder("Qwen3VitEncoder", num_classes=None),
    "deepseek classifier": lambda: encoder("DeepseekVitClassifier"),
    "no pool (token labels)": lambda: vit(global_pool=""),
}
ALL = SEQUENCES | GRIDS
KEEP = {0: 0.75, 1: 0.5}  # 16 -> 12 -> 6 patches
each = pytest.mark.parametrize("name", ALL)
each_sequence = pytest.mark.parametrize("name", SEQUENCES)


def keep_of(model) -> dict:
    return dict(zip(host_of(model).scored, KEEP.values()))


@each
def test_keeping_all_changes_no_bit_and_nothing_is_left_behind(name):
    """Rows 6, 8, 18, 19."""
    model, x = ALL[name](), images()
    before = traces(model)
    with torch.no_grad():
        dense = model(x)
        handle = gp.prune_tokens(model, gp.ZeroTPrune(keep=1.0))
        assert torch.equal(model(x), dense)
        handle.set(keep=keep_of(model))
        assert (model(x) - dense).abs().max() > 1e-3  # ten times float32 noise and more: tokens did go
        assert model(x).shape == dense.shape
        handle.remove()
        assert torch.equal(model(x), dense)
    assert traces(model) == before


@each_sequence
def test_the_first_reduction_hands_on_the_prefix_and_the_kept_patches_in_order(name):
    """Rows 9, 27: class, distillation and register tokens stay, and stay first."""
    model, x = SEQUENCES[name](), images()
    block, prefix = model.blocks[0], model.num_prefix_tokens
    outputs = []
    with torch.no_grad():
        hook = block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        model(x)
        hook.remove()
        method = Watched(keep={0: 10, 1: 6, 2: 3})
        handle = gp.prune_tokens(model, method)
        counts = []
        for each_block in model.blocks:
            each_block.register_forward_hook(lambda module, inputs, output: counts.append(output.shape[1]))
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        model(x)
    kept = method.seen[0][3].kept
    assert (kept.diff(dim=1) > 0).all()
    patches = outputs[0][:, prefix:].gather(1, kept[..., None].expand(-1, -1, 24))
    expected = torch.cat([outputs[0][:, :prefix], patches], 1)
    assert torch.equal(outputs[1], expected)
    assert counts == [prefix + 10, prefix + 6, prefix + 3]
    handle.remove()


def heads_sorted(x: torch.Tensor) -> torch.Tensor:
    return x[:, x.double().sum((0, 2, 3)).argsort()]


@each_sequence
def test_what_is_scored_is_what_the_fused_attention_of_the_layer_was_given(name):
    """Rows 7, 10, 20: queries and keys after norm and rotation, the gathered bias; fused in every block."""
    model, x = SEQUENCES[name](), images()
    method = Watched(keep=KEEP)
    with torch.no_grad(), gp.prune_tokens(model, method), AttentionCalls() as attention:
        model(x)
    per_block = 2 if "differential" in name or "things" in name else 1
    pools = 1 if getattr(model, "attn_pool", None) is not None else 0
    assert len(attention.calls) == 3 * per_block + pools
    assert len(method.seen) == 2
    for layer, (query, key, view, _) in enumerate(method.seen):
        calls = attention.calls[layer * per_block : (layer + 1) * per_block]
        q, k = (torch.cat([call[i] for call in calls], 1) for i in (0, 1))
        torch.testing.assert_close(heads_sorted(query), heads_sorted(q), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(heads_sorted(key), heads_sorted(k), rtol=1e-5, atol=1e-5)
        assert view.scale == pytest.approx(q.shape[-1] ** -0.5)
        mask = calls[0][2]
        assert (mask is None) == (view.bias is None)
        if mask is not None:
            torch.testing.assert_close(mask.expand(2, -1, -1, -1), view.bias.expand(2, -1, -1, -1))


@each
def test_a_picture_does_not_depend_on_the_others_of_its_batch(name):
    model, x = ALL[name](), images(3)
    with torch.no_grad(), gp.prune_tokens(model, gp.ZeroTPrune(keep=keep_of(model))):
        together, alone = model(x), torch.cat([model(row[None]) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)  # other matrix sizes round otherwise


@each
def test_copies_and_pickles_are_reduced_on_their_own(name):
    """Row 12."""
    model, x = ALL[name](), images()
    with torch.no_grad():
        dense = model(x)
        handle = gp.prune_tokens(model, gp.ZeroTPrune(keep=keep_of(model)))
        short = model(x)
        copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        handle.remove()
        assert torch.equal(model(x), dense)
        assert torch.equal(copied(x), short)
        assert torch.equal(loaded(x), short)


@each_sequence
def test_placements_and_merging_work_or_say_why_not(name):
    model, x = SEQUENCES[name](), images()
    host = host_of(model)
    found = []
    with torch.no_grad(), gp.prune_tokens(model, gp.ZeroTPrune(keep=1.0)) as handle:
        for placement in ("after_block", "before_mlp"):
            for reduce in ("drop", "merge", "mlerp"):
                settings = {"keep": KEEP, "placement": placement, "reduce": reduce}
                if placement == "before_mlp" and not host.before_mlp:
                    with pytest.raises(gp.UnsupportedModel, match="Use placement='after_block'"):
                        handle.set(**settings)
                    continue
                handle.set(**settings)
                out = model(x)
                assert torch.isfinite(out).all()
                if (placement, reduce) == ("before_mlp", "drop"):  # an MLP treats each token alone
                    torch.testing.assert_close(out, found[0], rtol=1e-4, atol=1e-4)
                    continue
                assert not any(torch.equal(out, other) for other in found)
                found.append(out)
                state = handle._state  # nothing large stays in memory
                slots = [
                    *state.query,
                    *state.key,
                    *state.bias,
                    *state.rope,
                    *state.residual,
                    *state.branch,
                    state.full,
                ]
                assert all(slot is None for slot in slots)


@each_sequence
def test_proportional_attention_adds_to_the_logits_only_after_merges(name):
    """Row 29."""
    model, x = SEQUENCES[name](), images()
    with torch.no_grad(), gp.prune_tokens(model, gp.ZeroTPrune(keep={1: 0.5}, reduce="merge")) as handle:
        with AttentionCalls() as on:
            model(x)
        handle.set(proportional=False)
        with AttentionCalls() as off:
            model(x)
    layers = len([call for call in on.calls if call[0].shape[-2] > 1]) // 3
    for position, (with_sizes, without) in enumerate(zip(on.calls, off.calls)):
        same = (with_sizes[2] is None and without[2] is None) or (
            with_sizes[2] is not None and without[2] is not None and torch.equal(with_sizes[2], without[2])
        )
        if position < 2 * layers:
            assert same
        elif with_sizes[0].shape[-2] > 1 and position < 3 * layers:
            assert not same


@each_sequence
def test_intermediates_have_the_full_grid(name):
    """Rows 11, 27: twice, after other calls; every kept patch is at its place, and `restore` fills the others."""
    model, x = SEQUENCES[name](), images()
    method = Watched(keep=KEEP)
    with torch.no_grad(), gp.prune_tokens(model, method) as handle:
        short = model.forward_features(x)
        for restore in ("own", "zeros", "nearest"):
            handle.set(restore=restore)
            for _ in range(2):
                final, maps = model.forward_intermediates(x, output_fmt="NLC")
                assert [tuple(y.shape) for y in maps] == [(2, 16, 24)] * 3
                assert final.shape[1] == model.num_prefix_tokens + 16
            if restore == "zeros":
                assert [int((y.abs().sum(-1) > 0).sum(1)[0]) for y in maps] == [12, 6, 6]
            if restore == "nearest":
                assert len(maps[2][0].unique(dim=0)) == 6
        assert torch.equal(model.forward_features(x), short)
        first, second = (seen[3].kept for seen in method.seen[:2])
        places = first.gather(1, second) + model.num_prefix_tokens
        handle.set(restore="own")
        final, _ = model.forward_intermediates(x)
        kept = final.gather(1, places[..., None].expand(-1, -1, 24))
        torch.testing.assert_close(kept, short[:, model.num_prefix_tokens :], rtol=1e-5, atol=1e-5)
        grid = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
        assert grid.shape == (2, 24, 4, 4)
