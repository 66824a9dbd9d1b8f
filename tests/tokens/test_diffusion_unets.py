"""Image tokens inside the transformer blocks of SD and SDXL U-Nets: pruned before, all there again after each."""

from __future__ import annotations

import pytest
import torch
from tiny_hosts import ddpm_unet, sd_unet
from token_denoisers import UNETS, denoiser, hooks_on, inputs_of, run

import genprune as gp
from genprune.tokens.diffusion import DiffusionTokens

DROP = gp.ZeroTPrune(score="vote", similarity_share=0.3, reduce="drop")
LEVEL = {"sd": 0, "sdxl": 1}  # where the tiny ones have transformer blocks
# The block that runs after the first one of its level.
SECOND = {
    "sd": "up_blocks.1.attentions.0.transformer_blocks.0",
    "sdxl": "down_blocks.1.attentions.0.transformer_blocks.1",
}
FIRST = {
    "sd": "down_blocks.0.attentions.0.transformer_blocks.0",
    "sdxl": "down_blocks.1.attentions.0.transformer_blocks.0",
}


class Seen:
    """Inputs and outputs of modules."""

    def __init__(self, model, *paths):
        self.calls = {path: [] for path in paths}
        self.hooks = [
            model.get_submodule(path).register_forward_hook(
                lambda m, args, kwargs, out, path=path: self.calls[path].append((args, kwargs, out)), with_kwargs=True
            )
            for path in paths
        ]

    def remove(self):
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("restore", ["update", "own", "nearest", "zeros"])
@pytest.mark.parametrize("family", UNETS)
def test_a_reduced_block_is_the_host_block_on_gathered_tokens(family, restore):
    """One row, by hand: gather, the host's block alone, and every way of bringing the others back."""
    model = denoiser(family)
    inputs = inputs_of(model, family, batch=1)
    path = SECOND[family]
    handle = gp.prune_tokens(model, DiffusionTokens(DROP, tokens=0.5, restore=restore))
    seen = Seen(model, path)  # after ours, so that it sees what our hook returns
    run(model, inputs)
    seen.remove()
    (args, kwargs, output), choice = seen.calls[path][0], handle._host.steps.chosen[LEVEL[family]].choice
    handle.remove()
    short, kept = args[0] if args else kwargs["hidden_states"], choice.kept[0]
    # The scoring block stands before: its hidden states lead to this block in full.
    whole = Seen(model, path)
    before = _before(model, family, inputs, path)
    whole.remove()
    assert torch.allclose(short, before[:, kept], atol=1e-6)
    with torch.no_grad():
        after = model.get_submodule(path)(short, **{k: v for k, v in kwargs.items() if k != "hidden_states"})
    expected = {
        "update": before + (after - short)[:, choice.target[0]] if choice.target is not None else None,
        "nearest": after[:, choice.target[0]] if choice.target is not None else None,
        "own": before.index_copy(1, kept, after),
        "zeros": torch.zeros_like(before).index_copy(1, kept, after),
    }[restore]
    assert torch.allclose(output, expected, atol=1e-5)


def _before(model, family, inputs, path):
    """What the block at `path` is given in the dense model; nothing before it is reduced."""
    seen = Seen(model, path)
    run(model, inputs)
    seen.remove()
    args, kwargs, _ = seen.calls[path][0]
    return args[0] if args else kwargs["hidden_states"]


@pytest.mark.parametrize("around", ["block", "attention"])
@pytest.mark.parametrize("family", UNETS)
def test_the_first_block_of_a_level_runs_in_full_and_chooses(family, around):
    model = denoiser(family)
    inputs = inputs_of(model, family)
    paths = [f"{FIRST[family]}.attn1", f"{SECOND[family]}.attn1", f"{SECOND[family]}.ff"]
    full = inputs["sample"][0, 0].numel() // 4 ** LEVEL[family]
    with gp.prune_tokens(model, DiffusionTokens(DROP, tokens=0.5, around=around)):
        seen = Seen(model, *(f"{path}.to_q" if path.endswith("attn1") else path for path in paths))
        run(model, inputs)
        seen.remove()
    lengths = [calls[0][0][0].shape[1] for calls in seen.calls.values()]
    assert lengths == [full, full // 2, full // 2 if around == "block" else full]


def test_around_attention_adds_what_the_nearest_token_got():
    model = denoiser("sd")
    inputs = inputs_of(model, "sd", batch=1)
    path = f"{SECOND['sd']}.attn1"
    with gp.prune_tokens(model, DiffusionTokens(DROP, tokens=0.5, around="attention")) as handle:
        seen = Seen(model, path, f"{path}.to_out.0")
        run(model, inputs)
        seen.remove()
        choice = handle._host.steps.chosen[0].choice
        short = seen.calls[f"{path}.to_out.0"][0][2]
        assert torch.equal(seen.calls[path][0][2], short[:, choice.target[0]])
        handle.set(restore="own")
        seen = Seen(model, path, f"{path}.to_out.0")
        run(model, inputs)
        seen.remove()
        output, kept = seen.calls[path][0][2], handle._host.steps.chosen[0].choice.kept[0]
        removed = torch.ones(output.shape[1], dtype=torch.bool).index_fill(0, kept, False)
        assert output[:, removed].abs().max() == 0 and torch.equal(
            output[:, kept], seen.calls[f"{path}.to_out.0"][0][2]
        )


def test_sdxl_defaults_act_at_the_deep_levels():
    """Row 14: the levels with many blocks, nothing to switch on."""
    model = denoiser("sdxl")
    inputs = inputs_of(model, "sdxl")
    dense = run(model, inputs)
    with pytest.raises(gp.BudgetUnreachable, match="tokens=0.5"):
        gp.prune_tokens(model, gp.ZeroTPrune(keep=0.3))  # convolutions alone cost more: said, not ignored
    with gp.prune_tokens(model, gp.ZeroTPrune(keep=0.9)) as handle:
        assert (run(model, inputs) - dense).abs().max() > 1e-2 * dense.std()
        report = handle.report()
        assert 0 < handle.counts[1] < report.tokens[1] and report.kept[0] == report.tokens[0]
        assert 0.88 < report.keep <= 0.9


@pytest.mark.parametrize("family", UNETS)
def test_macs_are_those_of_a_counted_call(family):
    from torch.utils.flop_counter import FlopCounterMode

    model = denoiser(family)
    point = {"height": 8, "width": 12, "text_length": 5}
    settings = DiffusionTokens(DROP, tokens=0.6, every=3, guidance="apart", operating_point=point)
    inputs = inputs_of(model, family, batch=1)
    with gp.prune_tokens(model, settings) as handle:
        found = []
        for timestep in (900, 800):
            with FlopCounterMode(display=False) as counter:
                run(model, inputs | {"timestep": torch.tensor([timestep])})
            found.append(counter.get_total_flops() // 2)
        report = handle.report()
        assert [report.total_macs, report.reusing_macs] == found
        assert report.dense_macs > found[0] > found[1]
        assert report.average_keep == pytest.approx((found[0] + 2 * found[1]) / 3 / report.dense_macs)
        assert report.to_json()["every"] == 3 and "average of 3 steps" in str(report)


def test_budgets_and_levels_that_cannot_be():
    model = denoiser("sd")
    for keep, said in (({1: 0.5}, "no level 1.*\\[0\\]"), ({0: 500}, "500 of 64"), (0.3, "fewest tokens")):
        with pytest.raises(gp.GenpruneError, match=said):
            gp.prune_tokens(model, gp.ZeroTPrune(keep=keep))
    with pytest.raises(gp.GenpruneError, match="at least half"):
        gp.prune_tokens(model, gp.ToMe(keep={0: 0.3}))
    with pytest.raises(gp.GenpruneError, match="of='latency'.*'macs'"):
        gp.prune_tokens(model, gp.ZeroTPrune(keep=0.95, of="latency"))
    assert not hooks_on(model)
    with gp.prune_tokens(model, gp.ToMe(r=10)) as handle:
        assert handle.counts == {0: 54}
        with pytest.raises(gp.GenpruneError, match="no setting 'evry'"):
            handle.set(evry=2)
        assert handle.set(keep={0: 40}).counts == {0: 40}


def test_models_without_tokens_to_share_are_refused():
    with pytest.raises(gp.UnsupportedModel, match="two transformer blocks"):
        gp.prune_tokens(
            sd_unet(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2), gp.ZeroTPrune()
        )
    with pytest.raises(gp.UnsupportedModel):
        gp.prune_tokens(ddpm_unet(), gp.ZeroTPrune())


def test_masks_of_ip_adapters_need_full_grids():
    model = denoiser("sd")
    inputs = inputs_of(model, "sd") | {"cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 1, 8, 8)]}}
    with gp.prune_tokens(model, DiffusionTokens(DROP, tokens=0.5)) as handle:
        with pytest.raises(gp.UnsupportedModel, match="around='attention'"):
            run(model, inputs)
        handle.set(around="attention")
