"""A routed pipeline draws what each prompt alone draws on its expert's real cut, in the order given."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from routed_cases import ROUNDING, SIZE, Alone, routed_parts, seeded
from router_cases import WORDS
from tiny_pipelines import dit_pipeline, flux_pipeline, sd3_pipeline, sd_pipeline

import genprune as gp
from genprune.pipelines import RoutedPipeline
from genprune.pipelines.stores import ReorderedStore
from genprune.routers import TimestepRouter

LATENT = {**SIZE, "output_type": "latent"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return routed_parts(sd_pipeline, tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def alone(parts):
    return Alone(*parts)


@pytest.fixture
def routed(parts, alone):  # `alone` is cut before anything is routed
    pipe, router = parts
    routed = RoutedPipeline(pipe, router)
    yield routed
    pipe = routed.unwrapped
    pipe.set_progress_bar_config(disable=True)


@pytest.mark.parametrize("store", ["reordered", "materialised"])
@pytest.mark.parametrize("make", [sd_pipeline, flux_pipeline, sd3_pipeline])
def test_every_prompt_as_alone_on_its_expert(make, store, tmp_path):
    pipe, router = routed_parts(make, tmp_path)
    dense = pipe(WORDS[0], generator=seeded(0), **LATENT).images
    alone, routed = Alone(pipe, router), RoutedPipeline(pipe, router, store)
    prompts = [*WORDS[:5], WORDS[0], WORDS[1]]  # with duplicates
    found = routed(prompts, generator=seeded(*range(7)), **LATENT).images
    for index, prompt in enumerate(prompts):
        assert (found[index] - alone.draw(prompt, (index,))[0]).abs().max() < ROUNDING
    assert (found[0] - dense[0]).abs().max() > 1e-2
    assert routed.statistics().counts == [router.route(prompts).experts.count(k) for k in range(3)]
    assert torch.equal(routed.unwrapped(WORDS[0], generator=seeded(0), **LATENT).images, dense)


@pytest.mark.parametrize("negative", [None, "blur", ["blur", "dark", "blur"]])
@pytest.mark.parametrize(("guidance", "images"), [(1.0, 3), (5.0, 1), (5.0, 3)])
def test_guidance_and_several_images(routed, alone, guidance, negative, images):
    prompts = WORDS[:3]
    seeds = [tuple(range(10 * i, 10 * i + images)) for i in range(3)]
    given = {"guidance_scale": guidance, "num_images_per_prompt": images, "negative_prompt": negative}
    found = routed(prompts, generator=seeded(*sum(seeds, ())), **given, **LATENT).images
    for index, prompt in enumerate(prompts):
        own = negative[index] if isinstance(negative, list) else negative
        expected = alone.draw(prompt, seeds[index], guidance_scale=guidance, negative_prompt=own)
        assert (found[index * images : (index + 1) * images] - expected).abs().max() < ROUNDING


@pytest.mark.parametrize(
    ("kind", "as_object"), [("latent", True), ("pt", True), ("np", True), ("np", False), ("pil", True), ("pil", False)]
)
def test_output_types(routed, alone, kind, as_object):
    prompts = WORDS[:4]
    output = routed(prompts, generator=seeded(*range(4)), output_type=kind, return_dict=as_object, **SIZE)
    images, flags = (output.images, output.nsfw_content_detected) if as_object else output
    assert type(output).__name__ == ("StableDiffusionPipelineOutput" if as_object else "tuple")
    assert flags is None and len(images) == 4
    for index, prompt in enumerate(prompts):
        expected = alone.draw(prompt, (index,), output_type=kind)[0]
        found, expected = np.asarray(images[index], dtype=float), np.asarray(expected, dtype=float)
        assert np.abs(found - expected).max() <= (1 if kind == "pil" else ROUNDING)  # a level of 255


def test_one_prompt_as_text(routed, alone):
    found = routed(WORDS[0], generator=seeded(3)[0], **LATENT).images
    assert found.shape[0] == 1
    assert (found - alone.draw(WORDS[0], (3,))).abs().max() < ROUNDING


def test_a_chosen_expert(routed, alone):
    for expert, each in ((2, (2, 2)), ([1, 0], (1, 0))):
        found = routed(WORDS[:2], expert=expert, generator=seeded(0, 1), **LATENT).images
        for index in (0, 1):
            expected = alone.draw(WORDS[index], (index,), expert=each[index])[0]
            assert (found[index] - expected).abs().max() < ROUNDING
    for wrong in (3, -1, [0], [0, "1"], True):
        with pytest.raises(gp.GenpruneError, match="for 2 prompts; expected an index from 0 to 2, or one for each"):
            routed(WORDS[:2], expert=wrong, **LATENT)


@pytest.mark.parametrize("one", [[1, 0], np.array([1, 0]), torch.tensor([1, 0]), [np.int64(1), torch.tensor(0)]])
def test_experts_of_other_libraries(routed, one):
    drawn = routed(WORDS[:2], expert=(1, 0), generator=seeded(0, 1), **LATENT).images
    assert torch.equal(routed(WORDS[:2], expert=one, generator=seeded(0, 1), **LATENT).images, drawn)


def test_embeddings_need_an_expert(routed, alone):
    embeds = routed.encode_prompt(WORDS[:2], "cpu", 1, False)[0]
    given = {"prompt_embeds": embeds, "guidance_scale": 1.0, "generator": seeded(0, 1)}
    with pytest.raises(gp.GenpruneError, match="2 embeddings and no prompt.*expert="):
        routed(**given, **LATENT)
    found = routed(**given, expert=[1, 0], **LATENT).images
    for index, expert in ((0, 1), (1, 0)):
        expected = alone.draw(WORDS[index], (index,), expert=expert, guidance_scale=1.0)[0]
        assert (found[index] - expected).abs().max() < ROUNDING


def test_given_latents_go_with_their_pictures(routed, alone):
    latents = torch.randn(6, 4, 8, 8, generator=seeded(5)[0])
    found = routed(WORDS[:3], latents=latents, num_images_per_prompt=2, **LATENT).images
    for index, prompt in enumerate(WORDS[:3]):
        expected = alone.draw(prompt, (0, 1), latents=latents[2 * index : 2 * index + 2])
        assert (found[2 * index : 2 * index + 2] - expected).abs().max() < ROUNDING


def test_one_generator_makes_pictures_independent_of_the_routes(routed):
    """Of the routes, and so of the order in which groups run."""
    first = routed(WORDS[:4], expert=[0, 1, 2, 1], generator=seeded(9)[0], **LATENT).images
    second = routed(WORDS[:4], expert=[0, 0, 2, 2], generator=seeded(9)[0], **LATENT).images
    assert (first[[0, 2]] - second[[0, 2]]).abs().max() < ROUNDING
    assert (first[0] - first[1]).abs().max() > 1e-2
    again = routed(WORDS[:4], expert=[0, 1, 2, 1], generator=[seeded(9)[0]] * 4, **LATENT).images
    assert not torch.equal(again[0], again[1])


def test_callbacks_know_their_prompts_and_the_progress_bar_its_expert(routed, capsys):
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append((routed.active_rows, routed.store.active, len(tensors["latents"])))
        return tensors

    routed.set_progress_bar_config(desc="drawing")
    routed(WORDS[:3], expert=[1, 0, 1], callback_on_step_end=note, **LATENT)
    assert seen == [((1,), 0, 1)] * 2 + [((0, 2), 1, 2)] * 2
    assert routed.active_rows is None
    told = capsys.readouterr().err
    assert "drawing: expert 0, 1 prompt" in told and "drawing: expert 1, 2 prompts" in told
    assert routed._progress_bar_config == {"desc": "drawing"}


def test_an_interrupt_ends_the_whole_call(routed):
    seen = []

    def once(pipe, step, timestep, tensors):
        seen.append((routed.active_rows, step))
        if len(seen) == 1:
            routed._interrupt = True  # as a stop button does
        return tensors

    given = {**LATENT, "num_inference_steps": 4}
    found = routed(WORDS[:3], expert=[0, 1, 2], generator=seeded(0, 1, 2), callback_on_step_end=once, **given).images
    assert seen == [((0,), 0)]
    for index in range(3):
        (stopped,) = routed(
            [WORDS[index]], expert=index, generator=seeded(index), callback_on_step_end=_stop, **given
        )[0]
        assert torch.equal(found[index], stopped)
    whole = routed(WORDS[:3], expert=[0, 1, 2], generator=seeded(0, 1, 2), **given).images  # nothing of it is left
    assert not torch.allclose(whole, found, atol=1e-2)


def _stop(pipe, step, timestep, tensors):
    pipe._interrupt = True
    return tensors


def test_a_deep_copy_draws_the_same(routed):
    given = {"expert": [0, 1], **LATENT}
    drawn = routed(WORDS[:2], generator=seeded(0, 1), **given).images
    twin = copy.deepcopy(routed)
    assert torch.equal(twin(WORDS[:2], generator=seeded(0, 1), **given).images, drawn)
    assert torch.equal(routed(WORDS[:2], generator=seeded(0, 1), **given).images, drawn)
    state = twin.unwrapped.unet.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in routed.unwrapped.unet.state_dict().items())


def test_an_unknown_argument_is_the_stock_error_and_nothing_runs(tmp_path):
    pipe, router = routed_parts(flux_pipeline, tmp_path)
    routed = RoutedPipeline(pipe, router)
    with pytest.raises(TypeError, match=r"FluxPipeline.__call__\(\) got an unexpected keyword argument 'seed'"):
        routed(WORDS[:2], seed=3)
    with pytest.raises(TypeError, match="multiple values for argument 'prompt_2'"):
        routed("cat", "dog", prompt_2="dog")
    assert routed.store.switches == 0 and routed.statistics().prompts == 0


def test_a_failed_group_names_its_prompts_and_counts_nothing(routed):
    def fail(pipe, step, timestep, tensors):
        if 0 in routed.active_rows:
            raise RuntimeError("out of luck")
        return tensors

    before = routed.statistics().to_json()
    with pytest.raises(RuntimeError, match="out of luck") as caught:
        routed(WORDS[:3], expert=[1, 0, 1], callback_on_step_end=fail, **LATENT)
    assert caught.value.__notes__ == ["expert 1 was running prompts 0 ('a cat'), 2 ('red fox')"]
    assert routed.statistics().to_json() == before and routed.active_rows is None
    with pytest.raises(ValueError, match="divisible by 8"):
        routed(WORDS[:3], num_inference_steps=1, height=17, width=16)
    assert routed.statistics().to_json() == before


def test_statistics_are_the_true_mean(routed):
    routed.reset_statistics()
    routed(WORDS[:3], expert=[1, 0, 1], num_images_per_prompt=2, **LATENT)
    found = routed.statistics()
    assert found.counts == [1, 2, 0]
    shares = routed.router.shares
    assert found.mean_share == pytest.approx((shares[0] + 2 * shares[1]) / 3)


def test_the_rest_is_the_stock_pipelines(routed):
    scheduler = routed.scheduler
    other = DPMSolverMultistepScheduler.from_config(scheduler.config)
    routed.scheduler = other
    assert routed.unwrapped.scheduler is other and routed.scheduler is other
    routed.scheduler = scheduler
    assert routed.vae is routed.unwrapped.vae and routed.device.type == "cpu"
    with pytest.raises(AttributeError, match="no attribute 'nothing_like_that'"):
        routed.nothing_like_that  # noqa: B018
    for name in ("unet", "router", "active_rows", "unwrapped"):
        with pytest.raises(gp.GenpruneError, match=f"'{name}' of a routed pipeline cannot be set.*Build a new"):
            setattr(routed, name, None)
    assert "StableDiffusionPipeline, PromptRouter of 3 experts, store='reordered'" in repr(routed)


@pytest.mark.parametrize("name", ["enable_model_cpu_offload", "fuse_lora", "load_lora_weights", "load_ip_adapter"])
def test_what_cannot_work_says_so(routed, name):
    with pytest.raises(gp.GenpruneError, match=f"{name} on a routed pipeline would reach one expert alone; expected"):
        getattr(routed, name)("anything")
    assert not hasattr(routed, "enable_teleportation")


def test_moving_casts_everything_once(tmp_path):
    pipe, router = routed_parts(sd_pipeline, tmp_path)
    routed = RoutedPipeline(pipe, router)
    routed(WORDS[:2], expert=[0, 1], **LATENT)
    assert routed.to(torch.float64) is routed
    found = routed(WORDS[:2], expert=[0, 1], generator=seeded(0, 1), **LATENT).images
    assert found.dtype == torch.float64 and routed.vae.dtype == torch.float64
    alone = Alone(routed.unwrapped, router)
    for index in (0, 1):
        expected = alone.draw(WORDS[index], (index,), expert=index)[0]
        assert (found[index] - expected).abs().max() < 1e-10
    assert router.route(WORDS).experts == routed.router.route(WORDS).experts


def test_an_expert_as_a_stock_pipeline(routed, alone, tmp_path):
    small = routed.expert_pipeline(1)
    expected = alone.draw(WORDS[0], (0,), expert=1)
    routed(WORDS[:1], expert=0, **LATENT)  # its weights are its own
    assert torch.equal(small(WORDS[0], generator=seeded(0), **LATENT).images, expected)
    assert type(small.unet).__name__ == "PrunedUNet2DConditionModel" and small.unet is not routed.unet
    assert small.scheduler is not routed.scheduler
    small.save_pretrained(tmp_path / "small")
    loaded = gp.load_pipeline(tmp_path / "small")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(loaded(WORDS[0], generator=seeded(0), **LATENT).images, expected)


def test_what_cannot_be_routed(parts, tmp_path):
    pipe, router = parts
    with pytest.raises(gp.UnsupportedModel, match="bare model; expected a stock pipeline.*ReorderedStore"):
        RoutedPipeline(pipe.unet, router)
    with pytest.raises(gp.UnsupportedModel, match="routed already"):
        RoutedPipeline(RoutedPipeline(pipe, router), router)
    with pytest.raises(gp.UnsupportedModel, match="DiTPipeline takes no prompt"):
        RoutedPipeline(dit_pipeline(), router)
    other, _ = routed_parts(sd3_pipeline, tmp_path)
    with pytest.raises(gp.PlanMismatch, match="SD3Transformer2DModel"):
        RoutedPipeline(other, router)
    changed = copy.copy(pipe)
    changed.__dict__["unet"] = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        changed.unet.conv_in.weight.mul_(1.5)
        for parameter in changed.unet.parameters():
            parameter.add_(0.1)
    with pytest.raises(gp.PlanMismatch, match="not those that the router was trained on") as caught:
        RoutedPipeline(changed, router.__class__(**_with_fingerprint(router, pipe)))
    assert caught.value
    RoutedPipeline(changed, router.__class__(**_with_fingerprint(router, pipe)), check_weights=False)
    with pytest.raises(gp.GenpruneError, match="store='reorderd', nearest name: 'reordered'; expected one of"):
        RoutedPipeline(pipe, router, "reorderd")


def _with_fingerprint(router, pipe) -> dict:
    from genprune.routers.fingerprints import weights_fingerprint

    names = ("encoder", "space", "predictor", "codes", "experts", "base", "training")
    return {name: getattr(router, name) for name in names} | {"weights_fingerprint": weights_fingerprint(pipe.unet)}


def test_one_copy_of_the_weights(routed):
    assert isinstance(routed.store, ReorderedStore)
    places = {p.untyped_storage().data_ptr() for p in routed.unwrapped.unet.parameters()}
    routed(WORDS[:2], expert=1, **LATENT)
    active = {p.untyped_storage().data_ptr() for p in routed.unet.parameters() if p.numel()}
    assert active <= places


@pytest.mark.parametrize("store", ["reordered", "materialised"])
def test_the_given_pipeline_is_left_alone(parts, store):
    pipe, router = parts
    before = pipe.unet
    drawn = pipe(WORDS[0], generator=seeded(0), **LATENT).images
    first, second = (RoutedPipeline(pipe, router, store) for _ in range(2))
    first(WORDS[:2], expert=[0, 1], **LATENT)
    assert pipe.unet is before and first.unet is not before
    if store == "reordered":
        for use in (
            lambda: second(WORDS[0], **LATENT),
            lambda: RoutedPipeline(pipe, router),
            lambda: second.expert_pipeline(0),
        ):
            with pytest.raises(gp.GenpruneError, match="serve an expert of another store; expected the dense model"):
                use()
        first.unwrapped  # noqa: B018
    assert torch.equal(pipe(WORDS[0], generator=seeded(0), **LATENT).images, drawn)
    second(WORDS[0], **LATENT)
    assert torch.equal(second.unwrapped(WORDS[0], generator=seeded(0), **LATENT).images, drawn)
    assert torch.equal(pipe(WORDS[0], generator=seeded(0), **LATENT).images, drawn)


def test_a_router_by_timestep_takes_class_labels_too(tmp_path):
    """Whatever the pipeline is called with: all rows run in one batch."""
    pipe = dit_pipeline()
    pipe.set_progress_bar_config(disable=True)
    plans = [gp.make_plan(pipe.transformer, gp.Random(keep=0.7, of="units", seed=k), progress=False) for k in (0, 1)]
    experts = [gp.routers.Expert(plan) for plan in plans]
    router = TimestepRouter(experts, (0.5,), base=plans[0].base)
    routed = RoutedPipeline(pipe, router)
    found = routed(class_labels=[0, 1], num_inference_steps=4, output_type="np", guidance_scale=1.0).images
    assert found.shape[0] == 2
    assert routed.statistics().counts == [2, 2]
