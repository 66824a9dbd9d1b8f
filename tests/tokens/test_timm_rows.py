"""Token reduction on timm models in use: other sizes, masks, padding, training, compilers, cuts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from token_hosts import SEQUENCES, Watched, beit, eva, images, lively, naflex, relpos, sam, traces, vit

import genprune as gp
from genprune.cutting import plan_base
from genprune.tokens.hosts import host_of

KEEP = {0: 0.75, 1: 0.5}
DROP = gp.ZeroTPrune(keep=KEEP, reduce="drop", placement="after_block")
MERGE = gp.ZeroTPrune(keep=KEEP, reduce="merge", placement="before_mlp")


@pytest.mark.parametrize("method", [DROP, MERGE], ids=["drop", "merge"])
def test_calls_of_every_kind_in_any_order(method):
    """Row 11: each twice, after an aborted call, and with other batches and image sizes between them."""
    model, x = vit(dynamic_img_size=True), images()
    with torch.no_grad(), gp.prune_tokens(model, method):
        first, features = model(x), model.forward_features(x)
        for abort in ("norm1", "norm2", "mlp", "drop_path2"):
            hook = getattr(model.blocks[1], abort).register_forward_pre_hook(_raise)
            with pytest.raises(KeyboardInterrupt):
                model.forward_intermediates(x) if abort == "norm2" else model(x)
            hook.remove()
            assert torch.equal(model(x), first)
        assert model.forward_features(images(3, 48)).shape == (3, 1 + 14, 24)  # of 36: 27, and no less than half
        model.forward_intermediates(images(1, 24))
        assert torch.equal(model(x), first)
        assert torch.equal(model.forward_features(x), features)


def _raise(module, inputs):
    raise KeyboardInterrupt


def test_non_square_pictures_keep_their_share():
    """Row 15: patches are counted from the tokens."""
    model = eva(use_rot_pos_emb=True, dynamic_img_size=True, use_abs_pos_emb=False)
    with torch.no_grad(), gp.prune_tokens(model, DROP):
        wide = torch.randn(2, 3, 16, 64)
        assert model.forward_features(wide).shape[1] == 1 + 6
        assert model.forward_intermediates(wide, intermediates_only=True)[2].shape == (2, 24, 2, 8)


def test_feature_extractors_and_dino_layers():
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=64, depth=4, out_indices=(1, 3))
    x = images(size=64)
    with torch.no_grad():
        dense = model(x)
        with gp.prune_tokens(model, gp.ZeroTPrune(keep={0: 0.5})):
            short = model(x)
        assert [y.shape for y in short] == [y.shape for y in dense] == [(2, 192, 4, 4)] * 2
        assert not torch.equal(short[0], dense[0])
        assert torch.equal(model(x)[1], dense[1])
    dino, x = SEQUENCES["dinov2-reg4"](), images()
    with torch.no_grad(), gp.prune_tokens(dino, DROP):
        maps = dino.get_intermediate_layers(x, 2, reshape=True, return_prefix_tokens=True)
    assert [(a.shape, b.shape) for a, b in maps] == [((2, 24, 4, 4), (2, 5, 24))] * 2


def test_a_model_without_pooling_gives_the_full_grid():
    """Token labels, as LV-ViT is trained with: a class for each patch."""
    model, x = vit(global_pool=""), images()
    with torch.no_grad():
        dense = model(x)
        with gp.prune_tokens(model, DROP):
            short = model(x)
    assert short.shape == dense.shape == (2, 17, 5)
    assert not torch.equal(short, dense)


# ---- masks and padding -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bool", "added", "keys"])
def test_padded_tokens_of_a_mask_go_first_and_change_nothing(kind):
    model, x = vit(class_token=False, global_pool="avg", pos_embed="none"), images()
    valid = torch.ones(2, 16, dtype=torch.bool)
    valid[0, [1, 4, 9, 15]] = False
    mask = {
        "bool": (valid[:, None] & valid[:, :, None])[:, None] | torch.eye(16, dtype=torch.bool) & valid[:, None, None],
        "added": torch.zeros(2, 1, 16, 16).masked_fill(~valid[:, None, None], float("-inf")),
        "keys": torch.zeros(2, 1, 1, 16).masked_fill(~valid[:, None, None], float("-inf")),
    }[kind]
    if kind == "bool":
        mask = mask | ~valid[:, None, :, None] & torch.eye(16, dtype=torch.bool).logical_not()  # rows of padding live
        mask = mask & valid[:, None, None]
    method = Watched(keep={0: 12, 1: 6})
    with torch.no_grad(), gp.prune_tokens(model, method):
        features = model.forward_features(x, attn_mask=mask)
        assert torch.isfinite(features).all()
        assert set(method.seen[0][3].kept[0].tolist()) == set(torch.where(valid[0])[0].tolist())
        other = x.clone()
        other[0, :, 8:16, 0:8] = 9.0  # the patch of place 4, padding
        torch.testing.assert_close(model.forward_features(other, attn_mask=mask), features)


def test_causal_attention_stays_causal():
    model, x = vit(class_token=False, global_pool="avg"), images()
    with torch.no_grad(), gp.prune_tokens(model, MERGE) as handle:
        assert torch.isfinite(model(x, is_causal=True)).all()
        handle.set(reduce="drop", placement="after_block", score="random")
        places = handle.model.forward_features(x, is_causal=True)
        last = x.clone()
        last[:, :, 24:, 24:] += 1.0  # the last patch: no earlier token sees it
        changed = model.forward_features(last, is_causal=True)
        assert torch.equal(places[:, :-1], changed[:, :-1])


def patch_dict(sizes, device="cpu"):
    """What timm's collator gives for pictures of different grids."""
    longest = max(h * w for h, w in sizes)
    patches = torch.randn(len(sizes), longest, 8 * 8 * 3, generator=torch.Generator().manual_seed(0))
    coord, valid = torch.zeros(len(sizes), longest, 2, dtype=torch.long), torch.zeros(len(sizes), longest, dtype=bool)
    for row, (h, w) in enumerate(sizes):
        places = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        coord[row, : h * w], valid[row, : h * w] = places, True
    return {"patches": patches, "patch_coord": coord, "patch_valid": valid}


NAFLEX = {
    "avg": {"global_pool": "avg", "class_token": False},
    "map": {"global_pool": "map", "reg_tokens": 1, "class_token": False},
    "token, rope": {"global_pool": "token", "class_token": True, "rope_type": "axial"},
    "avg, mixed rope": {"global_pool": "avg", "class_token": True, "rope_type": "mixed"},
}


@pytest.mark.parametrize("reduce", ["drop", "merge"])
@pytest.mark.parametrize("name", NAFLEX)
def test_patches_of_naflex_go_before_any_picture_and_pools_see_no_padding(name, reduce):
    model = naflex(**NAFLEX[name])
    batch = patch_dict([(4, 4), (3, 4), (2, 3)])
    alone = {key: value[1:2, :12] for key, value in batch.items()}  # without its four padded patches
    with torch.no_grad():
        dense = model(batch)
        with gp.prune_tokens(model, gp.ZeroTPrune(keep=1.0, reduce=reduce)) as handle:
            assert torch.equal(model(batch), dense)
            handle.set(keep={0: 12})  # the padding of row 1, to the patch
            out = model(batch)
            torch.testing.assert_close(out[1:2], model_alone(handle, model, alone), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(out[1:], dense[1:], rtol=1e-4, atol=1e-4)  # only padding went
            assert not torch.equal(out[0], dense[0])
            handle.set(keep={0: 0.5, 1: 0.5})
            features = model.forward_features(**batch)
            prefix = model.num_prefix_tokens
            assert features["patches"].shape[1] == prefix + 4
            assert features["patch_valid"].shape == (3, 4)
            assert features["patch_valid"].all()  # also row 2 has four patches left of six
            assert torch.isfinite(model(batch)).all()
            maps = model.forward_intermediates(batch, output_fmt="NLC", output_dict=True)
            assert maps["image_intermediates"][-1].shape == (3, 16, 24)
            assert torch.equal(maps["patch_valid"], batch["patch_valid"])


def model_alone(handle, model, batch):
    counts = dict(handle.counts)
    handle.set(keep=1.0)
    out = model(batch)
    handle.set(keep=counts)
    return out


# ---- pooling -----------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda: vit(class_token=False, global_pool="avg", fc_norm=True, pos_embed="none"),
        lambda: vit(global_pool="avg", fc_norm=False, pos_embed="none", pool_include_prefix=True),
        lambda: vit(class_token=False, global_pool="map", pos_embed="none"),
        lambda: eva(global_pool="avg", use_abs_pos_emb=False),
        lambda: beit(use_abs_pos_emb=False),
        lambda: naflex(global_pool="avg", class_token=False, pos_embed="none"),
    ],
    ids=["gap", "gap with prefix", "attention pool", "eva", "beit", "naflex"],
)
def test_merged_duplicates_pool_to_the_same(build):
    """Row 24: pictures of pairs of equal patches, four of eight merged, with their sizes in attention and pooling."""
    model = build()
    patches = torch.randn(2, 3, 4, 2, 8, 1, 8, generator=torch.Generator().manual_seed(3))
    x = patches.permute(0, 1, 2, 4, 3, 5, 6).expand(-1, -1, -1, -1, -1, 2, -1).reshape(2, 3, 32, 32)
    with torch.no_grad():
        dense = model(x)
        with gp.prune_tokens(model, gp.ToMe(keep={1: 12})) as handle:
            torch.testing.assert_close(model(x), dense, rtol=1e-4, atol=1e-4)
            handle.set(proportional=False)
            assert (model(x) - dense).abs().max() > 1e-3


def test_max_of_maximum_and_mean_is_never_merged():
    model = vit(global_pool="avgmax")
    with gp.prune_tokens(model, gp.ZeroTPrune(keep=KEEP)) as handle:
        assert handle.method.reduce == "drop"
        with pytest.raises(gp.UnsupportedModel, match="pools by 'avgmax'.*Use reduce='drop'"):
            handle.set(reduce="merge")


@pytest.mark.parametrize("score", ["wpr", "landmark", "vote"])
def test_without_a_class_token_all_votes_start_alike(score):
    """Row 25."""
    seen = []
    for build in (lambda: vit(class_token=False, global_pool="map"), lambda: vit(reg_tokens=1)):
        method = Watched(keep={0: 0.5}, score=score)
        with torch.no_grad(), gp.prune_tokens(build(), method) as handle:
            handle.model(images())
        view = method.seen[0][2]
        seen.append((view.class_token, view.prefix, method._class_weighted(score, view)))
    assert seen == [(False, 0, False), (True, 2, score != "vote")]
    with pytest.raises(gp.GenpruneError, match="no.*class token|has none"), torch.no_grad():
        gp.prune_tokens(vit(class_token=False, global_pool="avg"), gp.ZeroTPrune(keep={0: 0.5}, score="cls")).model(
            images()
        )


# ---- training -----------------------------------------------------------------

TRAINED = ["deit", "dinov3", "beit (own bias)", "relpos table", "naflex", "eva grouped"]


@pytest.mark.parametrize("method", [DROP, MERGE], ids=["drop", "merge"])
@pytest.mark.parametrize("name", TRAINED)
def test_gradients_reach_every_parameter_and_checkpointing_gives_the_same(name, method):
    model, x = SEQUENCES[name]().train(), images()
    with gp.prune_tokens(model, method):
        model(x).square().sum().backward()
        plain = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
        assert all(grad.abs().sum() > 0 for key, grad in plain.items() if "mask" not in key and "k_bias" not in key)
        model.zero_grad()
        model.set_grad_checkpointing(True)
        model(x).square().sum().backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, plain[key], rtol=1e-4, atol=1e-5)
        model.zero_grad()
        maps = model.forward_intermediates(x, intermediates_only=True)
        sum(y.square().sum() for y in maps).backward()  # blocks run once more when `forward_intermediates` is over
        again = {
            key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None
        }
        model.zero_grad()
        model.set_grad_checkpointing(False)
        sum(y.square().sum() for y in model.forward_intermediates(x, intermediates_only=True)).backward()
        for key, grad in again.items():
            torch.testing.assert_close(grad, model.get_parameter(key).grad, rtol=1e-4, atol=1e-4)


def test_patch_dropout_while_training():
    for model in (vit(patch_drop_rate=0.5), eva(use_rot_pos_emb=True, patch_drop_rate=0.5, rope_type="mixed")):
        model.train()
        with gp.prune_tokens(model, DROP):
            assert model.forward_features(images()).shape[1] == 1 + (8 * 12 // 16) * 6 // 12
            model(images()).sum().backward()


# ---- precision, devices, compilers -----------------------------------------------------------------

DIVERSE = ["deit", "dinov3", "beit (own bias)", "relpos shared", "eva grouped", "naflex rope", "parallel things"]


@pytest.mark.parametrize("name", DIVERSE)
def test_bfloat16_and_autocast_choose_and_run(name):
    model, x = SEQUENCES[name](), images()
    with torch.no_grad(), gp.prune_tokens(model, MERGE if host_of(model).before_mlp else DROP):
        dtype = model(x).dtype
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.isfinite(model(x)).all()
            assert model.forward_intermediates(x, intermediates_only=True)[2].shape == (2, 24, 4, 4)
        model.to(torch.bfloat16)
        assert model(x.bfloat16()).dtype == torch.bfloat16
        model.to(torch.float32)
        assert model(x).dtype == dtype == torch.float32


def test_a_model_that_is_moved_takes_its_hooks_along():
    model = vit()
    with gp.prune_tokens(model, DROP):
        model.to(torch.float64)
        assert model.forward_features(images().double()).shape[1] == 7
        model.to("meta")
        assert model.forward_features(images().double().to("meta")).shape == (2, 7, 24)


class Counting:
    """A compiler that runs what it is given, and counts how often it is asked."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize("name", [*DIVERSE, "sam"])
def test_one_graph_for_each_setting(name):
    """Rows 12, 13: no graph break; a setting that was met before is not compiled again."""
    model, x = sam(use_rel_pos=True) if name == "sam" else SEQUENCES[name](), images()
    first, second = (dict(zip(host_of(model).scored, rates)) for rates in ((0.75, 0.5), (0.5, 0.5)))
    torch._dynamo.reset()
    counting = Counting()
    with torch.no_grad(), gp.prune_tokens(model, gp.ZeroTPrune(keep=first)) as handle:
        eager = model(x)
        compiled = torch.compile(model, backend=counting, fullgraph=True)
        torch.testing.assert_close(compiled(x), eager, rtol=1e-4, atol=1e-4)
        compiled(x)
        before = counting.graphs
        other = handle.set(keep=second) and compiled(x)
        torch.testing.assert_close(other, model(x), rtol=1e-4, atol=1e-4)
        handle.set(keep=first)
        torch.testing.assert_close(compiled(x), eager, rtol=1e-4, atol=1e-4)
        assert counting.graphs <= before + 1
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["deit", "dinov2-reg4"])
def test_export(name):
    """Row 12."""
    model, x = SEQUENCES[name](), images()
    with torch.no_grad(), gp.prune_tokens(model, MERGE):
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-4)


def test_unfused_attention():
    from timm.layers import set_fused_attn

    for build in (SEQUENCES["deit"], SEQUENCES["beit (both biases)"], SEQUENCES["relpos mlp"], sam):
        fused, x = build(), images()
        set_fused_attn(False)
        try:
            plain = build()
        finally:
            set_fused_attn(True)
        with torch.no_grad():
            outputs = []
            for model in (fused, plain):
                keep = dict(zip(host_of(model).scored, (0.75, 0.5)))
                with gp.prune_tokens(model, gp.ZeroTPrune(keep=keep)):
                    outputs.append(model(x))
        torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)


# ---- models that are refused, cut or twice there -----------------------------------------------------------------


def test_two_models_do_not_disturb_each_other():
    model, x = vit(), images()
    twin = copy.deepcopy(model)
    with torch.no_grad(), gp.prune_tokens(model, DROP), gp.prune_tokens(twin, MERGE):
        a, b = model(x), twin(x)
        assert not torch.equal(a, b)
        assert torch.equal(model(x), a)
    with torch.no_grad():
        assert torch.equal(model(x), twin(x))


def test_a_pickle_of_a_call_s_end_holds_no_tensors_of_it():
    model = vit(depth=6)
    with torch.no_grad(), gp.prune_tokens(model, DROP):
        size = len(pickle.dumps(model))
        model(images(64))
        assert len(pickle.dumps(model)) == size


# Uneven heads and neurons; an attention without heads, a removed MLP.
CUT = ("blocks.0.attn:heads", "blocks.1.mlp:neurons", "blocks.1.attn:heads", "blocks.2.attn:branch")


def test_cut_models():
    import timm

    torch.manual_seed(0)
    model = lively(timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=5))
    sites = gp.find_sites(model)
    keep = {name: torch.zeros(sites[name].size, dtype=torch.bool) for name in CUT}
    keep["blocks.0.attn:heads"][0] = keep["blocks.1.mlp:neurons"][:9] = True
    gp.cut(model, gp.PruningPlan(plan_base(model), keep))
    x, before = images(), traces(model)
    with torch.no_grad():
        dense = model(x)
        with gp.prune_tokens(model, gp.ZeroTPrune(keep=1.0)) as handle:
            assert torch.equal(model(x), dense)
            assert host_of(model).scored == (0, 3)
            handle.set(keep={0: 0.5})
            assert model.forward_features(x).shape[1] == 1 + 8
            with pytest.raises(gp.NoMatchingSites, match="layer 1 cannot be read"):
                handle.set(keep={1: 0.5})
        assert torch.equal(model(x), dense)
    assert traces(model) == before


REFUSED = ["swin_tiny_patch4_window7_224", "xcit_nano_12_p16_224", "cait_xxs24_224", "pvt_v2_b0", "resnet18"]


@pytest.mark.parametrize("name", REFUSED)
def test_other_classes_are_refused_with_the_reason_and_left_alone(name):
    """Rows 7, 8."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    before = traces(model)
    with pytest.raises(gp.UnsupportedModel, match="cannot be reduced: its|can reduce; expected"):
        gp.prune_tokens(model, gp.ZeroTPrune())
    assert traces(model) == before


def test_a_block_that_hides_its_queries_says_so():
    model = vit()
    model.blocks[0].attn.forward = lambda x, attn_mask=None, is_causal=False: x
    with gp.prune_tokens(model, DROP), pytest.raises(gp.UnsupportedModel, match="no queries and keys were seen"):
        model(images())


# ---- SAM: patches skip MLPs -----------------------------------------------------------------


def test_patches_of_sam_skip_mlps_and_the_grid_stays():
    model, x = sam(use_rel_pos=True), images()
    tokens, method = [], Watched(keep={1: 8, 3: 4}, similarity_share=0.0)
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda module, inputs, output: tokens.append(inputs[0].shape[1]))
    outputs = {}
    model.blocks[2].register_forward_hook(lambda module, inputs, output: outputs.update(block=output))
    model.blocks[2].norm2.register_forward_pre_hook(lambda module, inputs: outputs.update(stream=inputs[0]))
    with torch.no_grad():
        model(x)
        whole = outputs["stream"]
        dense = outputs["block"]
        with gp.prune_tokens(model, method) as handle:
            model(x)
            assert tokens == [16] * 4 + [16, 16, 8, 8]
            kept = method.seen[0][3].kept
            out = outputs["block"].flatten(1, 2)
            gone = torch.ones(2, 16, dtype=torch.bool).scatter(1, kept, False)
            assert torch.equal(out[gone], whole[gone])
            torch.testing.assert_close(out[~gone], dense.flatten(1, 2)[~gone], rtol=1e-4, atol=1e-4)
            query, key, view, _ = method.seen[1]
            assert query.shape == key.shape == (2, 3, 8, 8)
            assert view.bias.shape == (2, 3, 8, 8)
            tokens.clear()
            handle.set(placement="before_mlp")
            model(x)
            assert tokens == [16, 8, 8, 4]
            with pytest.raises(gp.UnsupportedModel, match="grid stays whole"):
                handle.set(reduce="merge")
            with pytest.raises(gp.NoMatchingSites, match="layer 0 cannot be read"):
                handle.set(keep={0: 0.5})


def test_relative_positions_are_gathered_for_every_picture_alone():
    """A bias table of its own in each block, and a wrong row would show: against masks of the dense model."""
    model, x = relpos(depth=2), images()
    method = Watched(keep={0: 8})
    with torch.no_grad(), gp.prune_tokens(model, method):
        short = model.forward_features(x)
    kept = method.seen[0][3].kept  # (2, 8)
    with torch.no_grad():
        for row in range(2):
            alive = torch.zeros(16, dtype=torch.bool)
            alive[kept[row]] = True
            shut = torch.zeros(16).masked_fill(~alive, float("-inf"))
            hook = model.blocks[1].attn.rel_pos
            bias = type(hook).get_bias(hook)
            hook.__dict__["get_bias"] = lambda bias=bias, shut=shut: bias + shut
            dense = model.forward_features(x[row : row + 1])
            del hook.__dict__["get_bias"]
            torch.testing.assert_close(dense[:, alive], short[row : row + 1], rtol=1e-4, atol=1e-4)


def test_another_size_merges_at_most_half():
    """64 to 32 patches halves; of 49 a merge of pairs can take 24 at most, where rounding down would ask for 25."""
    model = vit(dynamic_img_size=True)
    with torch.no_grad(), gp.prune_tokens(model, gp.ToMe(keep={0: 8})):
        for side, patches in ((32, 8), (40, 13), (56, 25)):
            count = (side // 8) ** 2
            assert model.forward_features(images(1, side)).shape[1] == 1 + patches, count


def test_a_cut_asks_for_all_tokens():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, num_classes=5)
    plan = gp.PruningPlan(plan_base(model), {"blocks.0.attn:heads": torch.tensor([True, False, True])})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    handle = gp.prune_tokens(model, DROP)
    with pytest.raises(gp.PlanMismatch, match="remove"):
        gp.cut(model, plan)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    handle.remove()
    gp.cut(model, plan)


@pytest.mark.parametrize("build", [vit, eva, naflex, sam], ids=lambda build: build.__name__)
def test_what_was_compiled_before_sees_the_hooks(build):
    """torch.compile does not guard on hooks: a model compiled dense, or one like it, would run on without them."""
    torch._dynamo.reset()
    model, other, x = build(), build(), images()
    method = gp.ZeroTPrune(keep={model_layer(model): 0.5}, reduce="drop")
    compiled, apart = (torch.compile(each, backend="eager", fullgraph=True) for each in (model, other))
    with torch.no_grad():
        dense = compiled(x)
        with gp.prune_tokens(other, method):
            assert torch.equal(apart(x), other(x)) and not torch.equal(apart(x), dense)
        with gp.prune_tokens(model, method):
            assert torch.equal(compiled(x), model(x)) and not torch.equal(compiled(x), dense)
        assert torch.equal(compiled(x), dense)


def model_layer(model) -> int:
    return host_of(model).scored[0]
