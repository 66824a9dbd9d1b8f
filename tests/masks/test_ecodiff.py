"""`gp.EcoDiff` through `gp.score`: one run serves every budget, the pipeline is untouched, bad input is refused."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from mask_cases import OPTIONS, QUICK, DenoiserCalls, same_state, state_of
from tiny_pipelines import dit_pipeline

import genprune as gp
from genprune.denoising import draw_latents
from genprune.errors import BadCalibrationData, BudgetUnreachable, GenpruneError, NoMatchingSites
from genprune.masks import MaskLogits
from genprune.masks.objectives import row_losses
from genprune.methods import method_from_json, method_named, methods

PROMPTS = ["a cat", "two dogs", "red", "blue"]
ONE_STEP = QUICK | {"train_steps": 1}


def score(pipe, case, prompts=PROMPTS, **settings):
    run = {name: settings.pop(name) for name in ("output_dir", "resume", "seed") if name in settings}
    return gp.score(
        pipe,
        gp.EcoDiff(**(ONE_STEP | settings)),
        prompts=prompts,
        pipeline_options=OPTIONS[case],
        progress=False,
        **run,
    )


def check_cut(pipe, plan, of="params", miss=5e-3):
    """Pitfall 18: what is reported is what the really cut model has, within the budget."""
    slot = "unet" if hasattr(pipe, "unet") else "transformer"
    small = gp.cut(copy.deepcopy(getattr(pipe, slot)), plan)
    counted = gp.count_costs(small, **plan.operating_point)
    assert (counted.params, counted.macs) == (plan.figures["params"], plan.figures["macs"])
    left = getattr(counted, of) / plan.figures[f"dense_{of}"]
    assert left == pytest.approx(plan.made_by["budget"]["keep"], abs=miss)
    return small


def test_pitfall_18_one_run_serves_every_budget_and_the_pipeline_is_untouched(flux, tmp_path):
    model = flux.transformer
    model.train()
    model.x_embedder.eval()  # a mixture of modes, and of what trains
    model.proj_out.requires_grad_(False)
    before = state_of(flux)
    scores = score(flux, "flux", train_steps=2, guidance_scale=3.5, learning_rate=0.4, output_dir=tmp_path)
    assert same_state(state_of(flux), before)
    model.eval()
    for keep in (0.9, 0.6):
        check_cut(flux, scores.plan(keep=keep))
    wide, narrow = (scores.plan(keep=keep) for keep in (0.9, 0.6))
    for name, kept in wide.keep.items():  # the smaller plan is inside the larger one
        assert not (narrow.keep[name] & ~kept).any()
    logits, settings = MaskLogits.load(tmp_path / "logits.safetensors")
    assert all(torch.equal(logits[name].detach(), scores.values[name]) for name in scores.values)
    assert method_from_json({k: settings[k] for k in scores.method.to_json() if k in settings} | {
        "method": "ecodiff", "format_version": 1}) == scores.method  # fmt: skip
    assert scores.made_by["training"]["steps"] == 2 and scores.made_by["prompts"] == 4
    assert method_from_json(narrow.made_by["settings"]) == scores.method.changed(keep=0.6)
    json.dumps(dict(scores.made_by))


def test_an_interrupted_score_leaves_the_pipeline_as_it_was(sd):
    sd.unet.train()
    before = state_of(sd)
    with DenoiserCalls(sd, stop_at=5), pytest.raises(KeyboardInterrupt):
        score(sd, "sd")
    assert same_state(state_of(sd), before)
    sd.unet.eval()


def test_pitfall_17_what_validation_looks_at_is_what_is_exported():
    """Its loss is that of the exported plan's gates, with every constraint on the plan."""
    pipe = dit_pipeline()
    scores = score(
        pipe,
        "dit",
        prompts=[0, 1, 2, 3],
        train_steps=2,
        learning_rate=0.5,
        guidance_scale=1.5,
        keep=0.93,
        round_to=4,
        max_width_classes=1,
        min_keep=0.4,
        protect=("transformer_blocks.2.*",),
        validate_every=1,
        validation_prompts=1,
    )
    plan = scores.plan()
    assert plan.removed() and not any(name.startswith("transformer_blocks.2.") for name in plan.keep)
    options = {"class_labels": [3], "num_inference_steps": 2, "guidance_scale": 1.5, "seeds": [2**31]}
    with torch.no_grad():
        dense = draw_latents(pipe, **options)
        with gp.attach_gates(pipe, plan):
            gated = draw_latents(pipe, **options)
    assert float(row_losses(gated, dense, "rel_l2")) == scores.made_by["training"]["validation_loss"]
    other = scores.plan(max_width_classes=None, round_to=1)
    assert any(not torch.equal(mask, other.keep.get(name, ~mask)) for name, mask in plan.keep.items())


def test_protected_sites_are_not_learned_and_go_last(flux, tmp_path):
    protect = ("transformer_blocks.*",)
    settings = {"kinds": ("neurons",), "keep": 0.9, "protect": protect, "learning_rate": 0.5}
    scores = score(flux, "flux", output_dir=tmp_path, **settings)
    protected = {name for name in scores.values if name.startswith("transformer_blocks.")}
    assert protected and protected < set(scores.values)
    learned, _ = MaskLogits.load(tmp_path / "logits.safetensors")
    assert set(learned) == set(scores.values) - protected
    best = max(float(values.max()) for values in learned.detached().values())
    assert all(bool((scores.values[name] == best).all()) for name in protected)
    assert not protected & set(scores.plan().keep)
    assert protected & set(scores.plan(keep=0.75, protect=()).keep)


def test_units_per_kind(flux):
    plan = score(flux, "flux", of="units", keep=0.75, kinds=("heads", "neurons"), min_keep=0.0).plan()
    for kind, share in (("heads", 0.75), ("neurons", 0.75)):
        sites = gp.find_sites(flux).of_kind(kind)
        kept = sum(int(plan.keep[name].sum()) if name in plan.keep else site.size for name, site in sites.items())
        assert kept / sum(site.size for site in sites.values()) == share


def test_branches_and_blocks_with_what_is_inside_them(flux):
    scores = score(
        flux, "flux", kinds=("heads", "neurons", "branch", "block"), keep=0.7, train_steps=2, validate_every=2
    )
    assert {scores.costs.sites[name].kind for name in scores.values} == {"heads", "neurons", "branch", "block"}
    check_cut(flux, scores.plan(), miss=0.02)
    only = score(flux, "flux", kinds=("branch",), keep=0.8)
    check_cut(flux, only.plan(), miss=0.06)  # half a branch of six


def test_class_labels_and_unconditional_pipelines(ddpm):
    pipe = dit_pipeline()
    scores = score(pipe, "dit", prompts=[0, 1], guidance_scale=2.0)
    check_cut(pipe, scores.plan())
    assert scores.made_by["prompts"] == 2
    without = score(ddpm, "ddpm", prompts=None, validate_every=1, validation_prompts=2, objective="per_step")
    check_cut(ddpm, without.plan(), miss=0.02)
    assert without.made_by["training"]["validation_loss"] > 0


def test_pitfall_4_the_kept_count_is_exact_with_ties(sd):
    """All logits equal: each width between everything and the least that min_keep leaves."""
    scores = score(sd, "sd", kinds=("neurons",), of="units", keep=0.999, min_keep=0.0)
    tied = dataclasses.replace(scores, values={name: torch.zeros_like(v) for name, v in scores.values.items()})
    sizes = {name: len(values) for name, values in tied.values.items()}
    total = sum(sizes.values())
    for units in (total, total - 1, total // 2, 7, len(sizes)):
        plan = tied.plan(keep=units / total)
        kept = {name: int(plan.keep[name].sum()) if name in plan.keep else size for name, size in sizes.items()}
        assert sum(kept.values()) == pytest.approx(units, abs=0.005 * total) and min(kept.values()) >= 1
        if units in (total, len(sizes)):
            assert sum(kept.values()) == units
    with pytest.raises(BudgetUnreachable, match="cannot be reached"):
        tied.plan(keep=0.1, min_keep=0.5)


def test_a_budget_out_of_reach_is_refused_before_any_training(sd, tmp_path):
    with DenoiserCalls(sd) as calls:
        with pytest.raises(BudgetUnreachable, match="cannot be reached in UNet2DConditionModel with kinds heads"):
            score(sd, "sd", keep=0.2, kinds=("heads",), output_dir=tmp_path)
        with pytest.raises(NoMatchingSites, match=r"no site matches '\*attn9\*'"):
            score(sd, "sd", protect=("*attn9*",))
        assert calls.count == 0 and not any(tmp_path.iterdir())


def test_bad_targets_and_prompts_are_refused_before_any_training(sd, ddpm):
    dit = dit_pipeline()
    with DenoiserCalls(sd) as calls:
        for prompts, found in ((None, "none"), ([], "none"), ("a cat", "one string")):
            with pytest.raises(BadCalibrationData, match=f"needs calibration prompts, got {found}; expected a list"):
                score(sd, "sd", prompts=prompts)
        with pytest.raises(BadCalibrationData, match=r"prompts\[1\] is 3; expected a string"):
            score(sd, "sd", prompts=["a cat", 3])
        with pytest.raises(BadCalibrationData, match="UNet2DConditionModel is a bare model; .*use gp.Taylor"):
            gp.score(sd.unet, gp.EcoDiff(**ONE_STEP), prompts=PROMPTS, progress=False)
        for given in ({"data": [1]}, {"loss_fn": lambda model, batch: 0}):
            with pytest.raises(BadCalibrationData, match="takes no data and no loss_fn; expected prompts alone"):
                gp.score(sd, gp.EcoDiff(**ONE_STEP), prompts=PROMPTS, progress=False, **given)
        with pytest.raises(GenpruneError, match="resume=True without output_dir"):
            score(sd, "sd", resume=True)
        assert calls.count == 0
    for prompts, found in ((None, "none"), ([], "none"), (["a cat"], "'a cat'"), ([True], "True")):
        with pytest.raises(BadCalibrationData, match=f"DiTPipeline draws by class label, got {found}; expected whole"):
            score(dit, "dit", prompts=prompts)
    with pytest.raises(BadCalibrationData, match="DDPMPipeline draws without prompts, got 4; expected none. Leave"):
        score(ddpm, "ddpm")
    with pytest.raises(GenpruneError, match="are for methods that train, and Magnitude does not"):
        gp.score(sd, gp.Magnitude(), output_dir="somewhere")


RECIPE_PIPELINES = {"sd15": "sd", "sdxl": "sdxl", "sd3": "sd3", "flux-dev": "flux", "flux-schnell": "flux"}
SHRUNK = {
    "train_steps": 1, "denoising_steps": 2, "batch_size": 1, "gradient_accumulation_steps": 1, "validate_every": 0
}  # fmt: skip


@pytest.mark.parametrize("name", gp.EcoDiff.recipes())
def test_pitfall_23_every_recipe_takes_one_step_on_a_tiny_model_of_its_family(request, name, tmp_path):
    from denoising.chain_cases import sdxl_pipeline
    from tiny_pipelines import sd3_pipeline

    builders = {"sdxl": sdxl_pipeline, "sd3": sd3_pipeline}
    family = RECIPE_PIPELINES[name]
    pipe = builders[family](tmp_path) if family in builders else request.getfixturevalue(family)
    method = gp.EcoDiff.recipe(name, keep=0.85).changed(**SHRUNK)
    options = OPTIONS["flux"] if family in ("flux", "sd3") else OPTIONS["sd"]
    scores = gp.score(pipe, method, prompts=PROMPTS, pipeline_options=options, progress=False)
    check_cut(pipe, scores.plan())
    assert any(bool((values != method.init).any()) for values in scores.values.values())


def test_recipes_are_the_documented_ones():
    """Pitfall 22: nothing is cut short unless asked for; the budget is the caller's."""
    for name in gp.EcoDiff.recipes():
        recipe = gp.EcoDiff.recipe(name, keep=0.7)
        assert recipe.keep == 0.7 and recipe.train_steps * recipe.gradient_accumulation_steps >= 300
        assert recipe.init < recipe.relaxation.dead_zone  # every logit has a gradient at the start
        assert recipe.weight_decay == 0 and recipe.penalty == "smooth_l0"
        assert method_from_json(json.dumps(recipe.to_json())) == recipe
    with pytest.raises(GenpruneError, match="no EcoDiff recipe 'sdlx', nearest name: 'sdxl'; expected one of sd15"):
        gp.EcoDiff.recipe("sdlx")
    with pytest.raises(GenpruneError, match="EcoDiff has no 'keeep', nearest name: 'keep'"):
        gp.EcoDiff.recipe("sdxl", keeep=0.5)


@pytest.mark.parametrize(
    "method",
    [
        gp.EcoDiff(),
        gp.EcoDiff(keep=0.6, of="macs", kinds=("heads", "branch"), protect=("*attn2*",), seed=4),
        gp.EcoDiff(learning_rates={"neurons": 0.1, "heads": 1}, guidance_scale=(2, 7.5), noises_per_prompt=None),
        gp.EcoDiff(guidance_scale=3.5, activation_memory="8GiB", patience=3, loss="l1", objective="per_step"),
    ],
)
def test_settings_travel_as_json(method):
    again = method_from_json(json.dumps(method.to_json()))
    assert again == method and hash(again) == hash(method)
    assert method_from_json(method.to_json()) == method
    assert isinstance(again.learning_rates, tuple) and not isinstance(again.guidance_scale, list)


def test_settings_and_the_card():
    rates = gp.EcoDiff(learning_rates={"neurons": 0.1, "heads": 1}).learning_rates
    assert rates == (("heads", 1.0), ("neurons", 0.1))
    for wrong, match in (
        ({"learning_rates": 3}, "learning_rates=3; expected pairs of a kind and a number"),
        ({"learning_rates": (("heads", "fast"),)}, "expected pairs of a kind and a number"),
        ({"keep": 2}, "keep=2 is not a share of the dense model"),
        ({"train_steps": 0}, "train_steps=0"),
        ({"kinds": ("haeds",)}, "no kind of site is called 'haeds'"),
    ):
        with pytest.raises(GenpruneError, match=match):
            gp.EcoDiff(**wrong)
    with pytest.raises(GenpruneError, match="EcoDiff has no 'steps'"):
        method_named("ecodiff", steps=3)
    (card,) = (card for card in methods() if card.name == "ecodiff")
    assert "training" in card.needs and "prompts" in card.summary and gp.EcoDiff.trains
