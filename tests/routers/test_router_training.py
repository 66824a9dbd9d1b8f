"""Training a router: what learns from what, resuming to the bit, budgets, and refusals before any work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from safetensors.torch import load_file

import genprune as gp
from genprune.errors import BadCalibrationData, GenpruneError, PlanMismatch
from genprune.families import denoiser
from genprune.gates import gated_sites
from genprune.masks.checkpoints import checkpoints
from genprune.routers.settings import APTP
from genprune.routers.training import train_router

PROMPTS = ["a cat", "two dogs", "red fox", "old house", "blue bird", "green tree", "tall ship", "small boat"]
QUICK = APTP(
    experts=3, keep=0.8, steps=6, warmup=0.34, batch_size=4, learning_rate=0.05, lr_warmup_steps=1, teacher_steps=2
)
SIZE = {"height": 16, "width": 16}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny_pipelines.sd_pipeline(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return tiny_pipelines.flux_pipeline(tmp_path_factory.mktemp("flux"))


def latents(count: int = len(PROMPTS)) -> torch.Tensor:
    return torch.randn((count, 4, 8, 8), generator=torch.Generator().manual_seed(5))


def train(pipe, settings=QUICK, **changes):
    given = {"prompts": PROMPTS, "data": latents(), "pipeline_options": SIZE, "progress": False}
    return train_router(pipe, settings, **(given | changes))


@pytest.fixture(scope="module")
def finished(pipe, tmp_path_factory):
    """A run that nothing interrupted, and its folder."""
    folder = tmp_path_factory.mktemp("finished")
    before = {name: value.clone() for name, value in denoiser(pipe).state_dict().items()}
    router = train(pipe, output_dir=folder, checkpointing_steps=2)
    assert all(torch.equal(value, before[name]) for name, value in denoiser(pipe).state_dict().items())
    return router, folder


def curve_of(folder) -> list[dict]:
    return json.loads((folder / "curve.json").read_text())


def test_the_model_is_left_as_it_was(pipe, finished):
    model = denoiser(pipe)
    assert not gated_sites(model) and all(p.requires_grad for p in model.parameters())
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks


def test_experts_have_plans_usage_and_the_budget(pipe, finished):
    router, folder = finished
    assert len(router.experts) == 3 and sum(e.usage for e in router.experts) == pytest.approx(1)
    mean = sum(expert.usage * expert.share for expert in router.experts)
    assert mean == pytest.approx(0.8, abs=0.02)  # a tiny model has few units
    routes = router.route(PROMPTS).experts
    assert [routes.count(k) / len(PROMPTS) for k in range(3)] == pytest.approx([e.usage for e in router.experts])
    assert (folder / "router" / "router_config.json").is_file()
    for expert in router.experts:
        small = gp.cut(tiny_copy(pipe), expert.plan)
        found = gp.count_costs(small, **expert.plan.operating_point)
        assert found.macs == expert.plan.figures["macs"]


def tiny_copy(pipe):
    import copy

    return copy.deepcopy(denoiser(pipe))


def test_the_curve_tells_terms_codes_and_the_gap(finished):
    curve = curve_of(finished[1])
    assert [record["step"] for record in curve] == [1, 2, 3, 4, 5, 6]
    warm, late = curve[0], curve[-1]
    assert "codes" not in warm and "spread" not in warm["terms"]  # each prompt by itself
    assert len(late["codes"]) == 3 and sum(late["rows"]) == 4 and late["gap"] >= 0
    assert {"denoising", "output", "block", "resource", "contrastive", "spread", "largest"} <= late["terms"].keys()


def test_a_resumed_run_is_the_uninterrupted_one(pipe, finished, tmp_path, monkeypatch):
    router, folder = finished
    from genprune.routers import training_step

    step = training_step.RouterTraining.step

    def stops(self):
        if self.step_done == 4:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patched:
        patched.setattr(training_step.RouterTraining, "step", stops)
        with pytest.raises(KeyboardInterrupt):
            train(pipe, output_dir=tmp_path, checkpointing_steps=2)
    assert checkpoints(tmp_path)[-1].name.endswith("4")
    with pytest.raises(GenpruneError, match="resume=True"):
        train(pipe, output_dir=tmp_path)
    again = train(pipe, output_dir=tmp_path, resume=True, checkpointing_steps=2)
    # the share that can go is worked out anew on every start: losses are to the bit those of one run
    assert curve_of(tmp_path) == curve_of(folder)
    one = load_file(folder / "router" / "router.safetensors")
    other = load_file(tmp_path / "router" / "router.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert [e.plan for e in again.experts] == [e.plan for e in router.experts]


def test_a_checkpoint_of_other_settings_is_refused(pipe, finished):
    with pytest.raises(PlanMismatch, match="settings"):
        train(pipe, QUICK.changed(learning_rate=0.1), output_dir=finished[1], resume=True)


def gradients(pipe, **weights) -> tuple[float, float]:
    """How much one step with these weights alone moves codes and predictor, after the warm-up."""
    from genprune.routers import training_step

    seen = {}
    backward = training_step.RouterTraining.step

    def watch(self):
        record = backward(self)
        seen["norms"] = record["gradient_norms"]
        return record

    names = ("denoising", "resource", "contrastive", "output", "block", "spread", "largest", "commitment")
    zero = {f"{name}_weight": 0.0 for name in names}
    settings = QUICK.changed(**(zero | weights), warmup=0.0, steps=1)
    original, training_step.RouterTraining.step = training_step.RouterTraining.step, watch
    try:
        train(pipe, settings)
    finally:
        training_step.RouterTraining.step = original
    return tuple(seen["norms"])


@pytest.mark.parametrize(
    "name", ["denoising_weight", "output_weight", "block_weight", "resource_weight", "spread_weight"]
)
def test_codes_learn_from_all_that_the_denoiser_says(pipe, name):
    codes, predictor = gradients(pipe, **{name: 1.0})
    assert codes > 0 and predictor == 0


@pytest.mark.parametrize("name", ["contrastive_weight", "commitment_weight"])
def test_the_predictor_learns_from_contrast_and_commitment(pipe, name):
    codes, predictor = gradients(pipe, **{name: 1.0})
    assert codes == 0 and predictor > 0


_ONE_OF_TWO = """
import sys
sys.path[:0] = [{tests!r}, {here!r}]
from pathlib import Path
from accelerate import Accelerator
from test_router_training import QUICK, tiny_pipelines, train
folder = Path({folder!r}) / str(Accelerator(cpu=True).process_index)
folder.mkdir()
settings = QUICK.changed(batch_size=2, steps=4, warmup=0.5)
for experts in (3, 1):
    train(
        tiny_pipelines.sd_pipeline(folder),
        settings.changed(experts=experts),
        output_dir=Path({folder!r}) / f"of-{{experts}}",
        accelerator=Accelerator(cpu=True),
    )
"""


def test_two_processes_are_one_of_twice_the_batch_in_the_warm_up_as_well(pipe, tmp_path):
    # a plain accelerator, whose data parallelism stops where a parameter gets no gradient
    here = Path(__file__).parent
    (tmp_path / "two.py").write_text(_ONE_OF_TWO.format(tests=str(here.parent), here=str(here), folder=str(tmp_path)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, str(tmp_path / "two.py")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for experts in (3, 1):
        train(pipe, QUICK.changed(steps=4, warmup=0.5, experts=experts), output_dir=tmp_path / "one")
        for one, both in zip(curve_of(tmp_path / "one")[:2], curve_of(tmp_path / f"of-{experts}")[:2], strict=True):
            assert one["kept"] == pytest.approx(both["kept"], rel=1e-3)
            assert one["gradient_norms"] == pytest.approx(both["gradient_norms"], rel=1e-3)
        shutil.rmtree(tmp_path / "one")


def test_one_expert_is_a_static_plan(pipe):
    router = train(pipe, QUICK.changed(experts=1))
    assert len(router.experts) == 1 and router.experts[0].usage == 1
    assert set(router.route(PROMPTS).experts) == {0}
    assert router.experts[0].share == pytest.approx(0.8, abs=0.02)


def test_training_starts_around_scores(pipe):
    scores = gp.score(pipe, gp.Magnitude(keep=0.6, of="macs"), progress=False)
    settings = QUICK.changed(experts=1, steps=1, learning_rate=1e-6, keep=0.6, groups=10_000)
    point = vars(scores.dense.operating_point)
    router = train(pipe, settings, scores=scores, operating_point=point)
    wanted = scores.plan(0.6, "macs")
    assert router.plans[0].overlap(wanted) > 0.95
    assert router.experts[0].share == pytest.approx(0.6, abs=0.02)
    with pytest.raises(GenpruneError, match="scores is a dict"):
        train(pipe, settings, scores={})


def test_a_budget_of_latency_is_of_measured_times(pipe, tmp_path):
    settings = QUICK.changed(of="latency", steps=2, experts=2)
    router = train(pipe, settings, output_dir=tmp_path)
    reached = [e.plan.made_by["budget"]["reached"] for e in router.experts]
    assert sum(e.usage * share for e, share in zip(router.experts, reached)) == pytest.approx(
        0.8, abs=0.1
    )  # of few units
    assert all(e.plan.figures["latency_ms"] > 0 for e in router.experts)
    times = (tmp_path / "module_times.json").read_text()
    train(pipe, settings, output_dir=tmp_path, resume=True)  # what was measured is not measured again
    assert (tmp_path / "module_times.json").read_text() == times


def test_noise_levels_choose_where_asked(flux):
    settings = QUICK.changed(route_by="timestep", steps=3, experts=2)
    router = train(flux, settings, pipeline_options={**SIZE, "max_sequence_length": 8})
    assert router.kind == "timestep" and len(router.boundaries) == 1
    assert router.expert_at(0.0) == 0 and router.expert_at(1.0) == 1
    assert sum(e.usage * e.share for e in router.experts) == pytest.approx(0.8, abs=0.03)


def test_flow_matching_trains_and_refuses_min_snr(flux):
    options = {**SIZE, "max_sequence_length": 8}
    router = train(flux, QUICK.changed(steps=3), pipeline_options=options)
    assert len(router.experts) == 3
    with pytest.raises(GenpruneError, match="min_snr_gamma"):
        train(flux, QUICK.changed(min_snr_gamma=5.0), pipeline_options=options)


@pytest.mark.parametrize("name", ["sd3", "pixart_sigma"])
def test_other_transformers_train(name, tmp_path):
    """Pipelines of another text encoder each; the pooled text is what they have."""
    pipe = getattr(tiny_pipelines, f"{name}_pipeline")(tmp_path)
    options = {"max_sequence_length": 8, "num_inference_steps": 2}
    options |= SIZE if name == "sd3" else {"use_resolution_binning": False, **SIZE}
    data = None  # drawn: the layouts of their latents differ
    router = train(pipe, QUICK.changed(steps=2, experts=2), data=data, pipeline_options=options)
    assert len(router.experts) == 2 and len(router.route(["a cat"]).experts) == 1


def test_gradient_checkpointing_changes_nothing(pipe, finished):
    block, calls = pipe.unet.down_blocks[0].resnets[0], []
    hook = block.register_forward_pre_hook(lambda *given: calls.append(torch.is_grad_enabled()))
    try:
        router = train(pipe, QUICK.changed(gradient_checkpointing=True))
    finally:
        hook.remove()
    assert sum(calls) == 2 * QUICK.steps  # the gated pass, and the same once more in the backward pass
    assert [e.plan.keep.keys() for e in router.experts] == [e.plan.keep.keys() for e in finished[0].experts]
    for one, other in zip(router.experts, finished[0].experts):
        assert one.plan.overlap(other.plan) == 1


def test_refusals_before_any_work(pipe):
    with pytest.raises(BadCalibrationData, match="8 different prompts for 9 experts"):
        train(pipe, QUICK.changed(experts=9))
    with pytest.raises(BadCalibrationData, match="bare model"):
        train(denoiser(pipe))
    with pytest.raises(GenpruneError, match="APTP"):
        train(pipe, gp.EcoDiff())
    with pytest.raises(BadCalibrationData, match=r"prompts\[0\]"):
        train(pipe, prompts=[""])
    with pytest.raises(GenpruneError, match="no code of this space"):
        train(pipe, QUICK.changed(keep=0.01))
    with pytest.raises(BadCalibrationData, match="8 prompts for 3"):
        train(pipe, data=latents(3))


def test_settings_round_trip_and_ranges():
    settings = APTP(experts=4, kinds=("heads",), depth=("*:block",), min_snr_gamma=5)
    assert APTP.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    with pytest.raises(GenpruneError, match="nearest name: 'experts'"):
        settings.changed(expert=3)
    with pytest.raises(PlanMismatch, match="Upgrade"):
        APTP.from_json({**settings.to_json(), "format_version": 99})
    for wrong in ({"experts": 0}, {"keep": 0}, {"of": "units"}, {"temperature": 0}, {"route_by": "noise"}):
        with pytest.raises(GenpruneError, match=next(iter(wrong))):
            APTP(**wrong)
