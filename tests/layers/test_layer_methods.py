"""LAPTOP-Diff, FinerCut and LD-Pruner on real pipelines and models: exact figures, constraints, order, errors."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import tiny_pipelines
import torch
from tiny_hosts import vit

import genprune as gp
from genprune.families import denoiser
from genprune.layers.candidates import conflicts, families_of_children
from genprune.methods import method_from_json

PROMPTS = ["a b c", "d e", "f g h", "k"]
FEW = {"steps": 3, "timesteps": 2, "batch_size": 2}
METHODS = {
    "laptop": gp.LaptopDiff(keep=0.8, of="macs", additivity_sets=3, **FEW),
    "finercut": gp.FinerCut(keep=0.85, of="macs", **FEW),
    "ldpruner": gp.LDPruner(keep=0.8, of="macs", trajectory_steps=2, trajectories=4, menu=("remove",), **FEW),
    "operators": gp.LDPruner(keep=0.8, of="macs", criterion="output_mse", **FEW),
}
PIPELINES = {
    "sd": lambda folder: tiny_pipelines.sd_pipeline(folder),
    "ddpm": lambda folder: tiny_pipelines.ddpm_pipeline(),
    "flux": lambda folder: tiny_pipelines.flux_pipeline(folder),
    "sd3": lambda folder: tiny_pipelines.sd3_pipeline(folder),
    "dit": lambda folder: tiny_pipelines.dit_pipeline(),
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    built = {}
    for name, build in PIPELINES.items():
        torch.manual_seed(0)
        pipe = build(tmp_path_factory.mktemp(name))
        pipe.set_progress_bar_config(disable=True)
        with torch.no_grad():
            for parameter in denoiser(pipe).parameters():  # zero-initialised branches would all score the same
                parameter.add_(0.05 * torch.randn(parameter.shape))
        built[name] = pipe
    return built


def scored(pipe, method, **changes):
    labelled = "DiT" in type(pipe).__name__
    prompts = PROMPTS if hasattr(pipe, "tokenizer") else [0, 1, 0, 1] if labelled else None
    options = {"height": 16, "width": 16} if prompts and not labelled else {}
    if changes:
        method = method.changed(**changes)
    if prompts is None:
        method = method.changed(samples=4)
    return gp.score(pipe, method, prompts=prompts, pipeline_options=options, progress=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PIPELINES)
def test_figures_are_those_of_the_cut_model_and_gates_agree(pipelines, name, method):
    pipe = pipelines[name]
    model = denoiser(pipe)
    before = copy.deepcopy(model.state_dict())
    scores = scored(pipe, METHODS[method])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    plan = scores.plan()
    small = gp.cut(copy.deepcopy(model), plan)
    costs = gp.count_costs(small, **plan.operating_point)
    assert (costs.params, costs.macs) == (plan.figures["params"], plan.figures["macs"])
    assert plan.made_by["budget"]["reached"] == pytest.approx(costs.macs / plan.figures["dense_macs"])
    assert abs(plan.made_by["budget"]["reached"] - scores.method.keep) < 0.12  # few and coarse layers
    assert plan.made_by["layers"]
    inputs = _inputs(model)
    with torch.no_grad():
        with gp.attach_gates(model, plan):
            gated = _run(model, inputs)
        cut = _run(small, inputs)
    assert float((gated - cut).norm() / cut.norm()) <= 1e-5


def _inputs(model):
    from genprune.costs import operating_point
    from genprune.families import family_of

    torch.manual_seed(1)
    return family_of(model).example_inputs(model, operating_point(model), "cpu", torch.float32)


def _run(model, inputs):
    output = model(**inputs)
    return output if isinstance(output, torch.Tensor) else output.sample


def test_losses_are_the_squared_errors_of_really_cut_models(pipelines):
    pipe = pipelines["sd"]
    from genprune.cutting import plan_base
    from genprune.denoising.replay import recorded_calls

    method = METHODS["laptop"].changed(additivity_sets=0)
    losses = scored(pipe, method).losses
    calls = recorded_calls(pipe, PROMPTS, height=16, width=16, weights=(1, 1), **FEW)
    base, checked = plan_base(pipe.unet), 0
    for name in sorted(losses)[::4]:
        small = gp.cut(copy.deepcopy(pipe.unet), gp.PruningPlan(base, {name: torch.zeros(1, dtype=torch.bool)}))
        with torch.no_grad():
            errors = [
                (small(**call.inputs).sample - pipe.unet(**call.inputs).sample).square().flatten(1).mean(1)
                for call in calls
            ]
        naive = float(torch.stack([error.double().mean() for error in errors]).mean())
        assert losses[name] == pytest.approx(naive, rel=1e-5)
        checked += 1
    assert checked > 3


def test_scoring_twice_is_bit_equal_and_order_does_not_matter(pipelines):
    from genprune.denoising.replay import recorded_calls
    from genprune.layers.candidates import removal_candidates
    from genprune.layers.distances import squared_error
    from genprune.layers.output_loss import OutputLoss

    pipe = pipelines["flux"]
    first = scored(pipe, METHODS["laptop"])
    assert first.losses == scored(pipe, METHODS["laptop"]).losses
    candidates = list(first.candidates.values())
    calls = recorded_calls(pipe, PROMPTS, height=16, width=16, weights=(1, 1), **FEW)
    loss = OutputLoss(pipe.transformer, first.costs.sites, calls, squared_error)
    backwards = loss.alone(list(reversed(candidates)))
    assert backwards == {c.name: first.losses[c.name] for c in candidates}
    assert removal_candidates(first.costs.sites, first.costs)


def test_the_selection_is_the_best_of_all(pipelines):
    scores = scored(pipelines["flux"], METHODS["laptop"], protect_first=0, max_consecutive=None, additivity_sets=0)
    candidates = list(scores.candidates.values())
    assert 6 <= len(candidates) <= 16
    groups = families_of_children(candidates, scores.costs.sites)
    dense, total = scores.dense.macs, scores.costs.total.macs
    smallest = min(c.saves["macs"] for c in candidates) / dense
    half = max(0.005, smallest / 2)
    sets = []
    for size in range(len(candidates) + 1):
        for chosen in itertools.combinations(range(len(candidates)), size):
            if any(conflicts(candidates[a], candidates[b]) for a, b in itertools.combinations(chosen, 2)):
                continue
            if not any(set(chosen) >= set(group) for group in groups):
                share = (total - sum(candidates[i].saves["macs"] for i in chosen)) / dense
                sets.append((share, sum(scores.losses[candidates[i].name] for i in chosen)))
    for keep in (0.85, 0.7, 0.5):
        mine = sum(scores.losses[name] for name in scores.plan(keep=keep).made_by["layers"])
        # as near to the budget as there is any set, and then the cheapest
        windows = [(half, half), (0.005, smallest), (0.005, 1.0)]
        inside = [[loss for s, loss in sets if keep - over <= s <= keep + under] for under, over in windows]
        assert mine == pytest.approx(min(next(losses for losses in inside if losses)), rel=1e-6)


def test_several_budgets_hold_at_once(pipelines):
    scores = scored(pipelines["sd"], METHODS["laptop"], additivity_sets=0)
    alone = scores.plan(keep=0.8)
    params = alone.figures["params"] / alone.figures["dense_params"]
    both = scores.plan(keep=0.8, also=(("params", round(params - 0.08, 3)),))
    assert both.figures["params"] / both.figures["dense_params"] <= params - 0.08 + 0.006
    assert both.made_by["budgets"].keys() == {"macs", "params"}


def test_protected_layers_and_neighbours_stay(pipelines):
    scores = scored(pipelines["flux"], METHODS["laptop"], additivity_sets=0)
    for keep in (0.8, 0.6):
        plan = scores.plan(keep=keep)
        assert not any(name.startswith("transformer_blocks.0.") for name in plan.keep)  # the family's own rule
    free = scores.plan(keep=0.6, protect=("single_transformer_blocks.1:block",))
    assert "single_transformer_blocks.1:block" not in free.keep
    with pytest.raises(gp.NoMatchingSites, match="single_transformer_blocks.9"):
        scores.plan(keep=0.6, protect=("single_transformer_blocks.9:block",))


def test_constraints_on_neighbours_and_groups():
    torch.manual_seed(0)
    model = vit_of_depth(6)
    data = [torch.randn(4, 3, 16, 16)]
    method = gp.LaptopDiff(keep=0.6, of="params", kinds=("block",), max_consecutive=1, additivity_sets=0)
    scores = gp.score(model, method, data=data, progress=False)
    gone = sorted(int(name.split(".")[1].split(":")[0]) for name in scores.plan().keep)
    assert len(gone) >= 2 and all(b - a > 1 for a, b in itertools.pairwise(gone))
    plan = scores.plan(keep=0.53, n_of_m=(1, 2), max_consecutive=None)
    gone = {int(name.split(".")[1].split(":")[0]) for name in plan.keep}
    assert [len(gone & {i, i + 1}) for i in (0, 2, 4)] == [1, 1, 1]
    with pytest.raises(gp.BudgetUnreachable, match=r"max_consecutive=1"):
        scores.plan(keep=0.2)


def vit_of_depth(depth: int):
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, num_heads=3, depth=depth, num_classes=5
    )
    return model.eval()


def test_an_emptied_wrapper_goes_as_a_whole(pipelines):
    scores = scored(pipelines["sd"], METHODS["laptop"], additivity_sets=0)
    # branches and blocks that lose nothing: without the rule all of them would go and leave empty wrappers
    free = {name: 0.0 if ":block" in name or "attentions" in name else loss for name, loss in scores.losses.items()}
    wrappers = {name: loss for name, loss in free.items() if name.endswith(":wrapper")}
    free |= dict.fromkeys(wrappers, 1e-9)
    plan = dataclasses.replace(scores, losses=free).plan(keep=0.8)
    sites = scores.costs.sites
    for name, site in sites.items():
        if site.kind in ("block", "wrapper") and name not in plan.keep:
            children = [n for n, s in sites.items() if s.parent == name and s.kind in ("branch", "block")]
            above = any(parent in plan.keep for parent in sites.ancestors(name))
            assert above or not children or not all(child in plan.keep for child in children)


def test_sd15_cannot_lose_half_by_layers_that_keep_their_shape():
    from stock_configs import SD15

    from genprune.costs import site_costs
    from genprune.cutting import plan_base
    from genprune.families import family_named
    from genprune.layers.candidates import removal_candidates
    from genprune.layers.scores import LayerScores

    with torch.device("meta"):
        model = family_named("UNet2DConditionModel").build(SD15)
    sites = gp.find_sites(model)
    costs = site_costs(model, sites=sites)
    changing = [
        f"{path}:branch"
        for path, module in model.named_modules()
        if type(module).__name__ == "ResnetBlock2D" and module.in_channels != module.out_channels
    ]
    method = gp.LaptopDiff(keep=0.5, of="params", kinds=("branch", "block"), protect=tuple(changing))
    candidates = {c.name: c for c in removal_candidates(sites, costs)}
    losses = dict.fromkeys(candidates, 1.0)
    scores = LayerScores(losses, candidates, method, plan_base(model, sites), costs, costs.total)
    with pytest.raises(gp.BudgetUnreachable, match=r"everything that may go is 47\.8%"):
        scores.plan()
    plan = scores.plan(keep=0.5, protect=(), kinds=None)
    assert plan.made_by["budget"]["reached"] == pytest.approx(0.5, abs=0.005)


def test_additivity_decides_between_knapsack_and_greedy(pipelines):
    method = METHODS["laptop"].changed(additivity_sets=4, min_correlation=-1.0)
    exact = scored(pipelines["sd"], method)
    assert exact.order is None and len(exact.additivity.true) == 4
    assert "additivity Pearson" in str(exact.plan()) and "Pearson" in str(exact)
    report = exact.plan().made_by["additivity"]
    assert set(report) == {"predicted", "true", "sizes", "pearson", "spearman"} and min(report["sizes"]) >= 2
    greedy = scored(pipelines["sd"], method.changed(selection="greedy", additivity_sets=0, keep=0.85))
    assert greedy.order and greedy.plan().made_by["selection"] == "greedy"
    always = dataclasses.replace(exact.additivity, true=tuple(reversed(exact.additivity.predicted)))
    assert always.spearman < 0


def test_greedy_scores_again_after_each_removal():
    torch.manual_seed(0)
    model, data = vit_of_depth(4), [torch.randn(4, 3, 16, 16)]
    method = gp.FinerCut(keep=0.7, of="params", distance="l2")
    scores = gp.score(model, method, data=data, progress=False)
    from genprune.cutting import plan_base
    from genprune.layers.distances import relative_norm

    gone: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        dense = model(data[0])
        for removal in scores.order:
            losses = {}
            for name in scores.candidates:
                if name in gone:
                    continue
                keep = gone | {name: torch.zeros(1, dtype=torch.bool)}
                small = gp.cut(copy.deepcopy(model), gp.PruningPlan(plan_base(model), keep))
                losses[name] = float(relative_norm(small(data[0]), dense).mean())
            assert removal.name == min(losses, key=losses.get)
            assert removal.loss == pytest.approx(losses[removal.name], rel=1e-4)
            gone[removal.name] = torch.zeros(1, dtype=torch.bool)
    assert len(gone) >= 2 and all(name.endswith(":branch") for name in gone)


@pytest.mark.parametrize("distance", ["angular", "l2", "js", "output_mse"])
def test_finercut_on_a_classifier(distance):
    torch.manual_seed(0)
    model = vit_of_depth(3)
    method = gp.FinerCut(keep=0.8, of="macs", distance=distance)
    plan = gp.make_plan(model, method, data=[torch.randn(4, 3, 16, 16)], progress=False)
    assert plan.keep and all(name.endswith(":branch") for name in plan.keep)


def test_logits_are_asked_for_by_js(pipelines):
    with pytest.raises(gp.GenpruneError, match="distance='js' compares probabilities"):
        scored(pipelines["sd"], METHODS["finercut"], distance="js")


def test_a_latency_budget_is_measured_and_planned_again(pipelines):
    pipe = pipelines["sd"]
    method = METHODS["laptop"].changed(keep=0.75, of="latency", additivity_sets=0)
    plan = gp.make_plan(pipe, method, prompts=PROMPTS, pipeline_options={"height": 16, "width": 16}, progress=False)
    share = plan.figures["latency_ms"] / plan.figures["dense_latency_ms"]
    assert plan.made_by["budget"]["of"] == "latency"
    assert plan.made_by["budget"]["reached"] == pytest.approx(share)
    assert plan.keep and plan.made_by["latency_device"]
    with pytest.raises(gp.GenpruneError, match="needs measured layers"):
        scored(pipe, METHODS["laptop"], additivity_sets=0).plan(of="latency")


def test_latent_statistics_are_those_of_the_paper(pipelines):
    from genprune.layers.latent_stats import statistics_distance

    torch.manual_seed(0)
    dense, moved = torch.randn(6, 2, 3), torch.randn(6, 2, 3)
    mean = (dense.mean(0) - moved.mean(0)).pow(2).sum().sqrt()
    spread = (dense.std(0) - moved.std(0)).pow(2).sum().sqrt()
    assert statistics_distance(moved, dense, relative=False) == pytest.approx(float(mean + spread), rel=1e-5)
    assert statistics_distance(dense, dense) == 0
    with pytest.raises(gp.GenpruneError, match="at least 2 samples"):
        gp.score(
            pipelines["sd"],
            METHODS["ldpruner"].changed(trajectories=None, samples=None),
            prompts=PROMPTS[:1],
            pipeline_options={"height": 16, "width": 16},
            progress=False,
        )


def test_a_bare_model_has_no_trajectory():
    with pytest.raises(gp.BadCalibrationData, match="bare model, which draws no trajectory"):
        gp.score(vit(), gp.LDPruner(), data=[torch.randn(2, 3, 32, 32)], progress=False)


def test_prescreening_leaves_the_cheapest(pipelines):
    method = METHODS["ldpruner"].changed(prescreen=5, menu=("remove", "linear"))
    scores = scored(pipelines["sd"], method)
    assert len(scores.losses) == len(scores.candidates) == 5


@pytest.mark.parametrize("name", METHODS)
def test_json_round_trip(name):
    method = METHODS[name].changed(also=(("params", 0.9),), protect=("*attn2*",))
    assert method_from_json(method.to_json()) == method


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: gp.LaptopDiff(of="units"), "expected one of params, macs, latency"),
        (lambda: gp.LaptopDiff(kinds=("heads",)), "no score for sites of kind 'heads'"),
        (lambda: gp.LaptopDiff(n_of_m=(2, 2)), "0 < n < m"),
        (lambda: gp.LaptopDiff(also=(("params", 0.5),)), "repeats"),
        (lambda: gp.LaptopDiff(distance="cosine"), "no distance 'cosine'"),
        (lambda: gp.LaptopDiff(selection="best"), "selection='best'"),
        (lambda: gp.LaptopDiff(additivity_sets=1), "one set has no correlation"),
        (lambda: gp.LaptopDiff(max_consecutive=0), "max_consecutive=0"),
        (lambda: gp.FinerCut(n_of_m=(1, 2)), "greedy walk cannot hold"),
        (lambda: gp.LDPruner(menu=("lowrank",)), "no operator 'lowrank'.*low_rank"),
        (lambda: gp.LDPruner(shares=(1.0,)), "between 0 and 1"),
        (lambda: gp.LDPruner(criterion="fid"), "criterion='fid'"),
        (lambda: gp.Magnitude(of="latency"), "methods that remove layers"),
    ],
)
def test_bad_values_say_what_to_type(build, message):
    with pytest.raises(gp.GenpruneError, match=message):
        build()
