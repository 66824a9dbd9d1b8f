"""Gates by row: a mixed batch equals its prompts on their really cut experts, guided and with many pictures."""

from __future__ import annotations

import copy

import pytest
import tiny_hosts
import tiny_pipelines
import torch

import genprune as gp
from genprune.cutting import plan_base
from genprune.errors import PlanMismatch
from genprune.families import denoiser, denoiser_slot, family_of, find_sites
from genprune.gates import attach_gates, gated_sites
from genprune.routers import relaxation
from genprune.routers.architecture import ArchitectureSpace
from genprune.routers.row_gates import RowGates

OPTIONS = {
    "sd": {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16},
    "sd, no guidance": {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16},
    "flux": {"num_inference_steps": 2, "height": 16, "width": 16, "max_sequence_length": 8},
    "flux, true guidance": {
        "num_inference_steps": 2,
        "true_cfg_scale": 2.0,
        "height": 16,
        "width": 16,
        "max_sequence_length": 8,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokens")


def experts_of(model, count: int = 2):
    """A space, gates `(count, size)` by site, and the plans of the same codes."""
    space = ArchitectureSpace.of(model)
    codes = relaxation.threshold(3.0) + torch.randn((count, space.length), generator=torch.Generator().manual_seed(1))
    plans = [gp.PruningPlan(plan_base(model), space.keep(code)) for code in codes]
    return space.gates(codes), plans


def draw(pipe, prompts, seeds, images=1, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if options.get("true_cfg_scale"):
        options["negative_prompt"] = [""] * len(prompts)
    given = {"generator": generators, "num_images_per_prompt": images, "output_type": "latent"}
    return pipe(prompts, **given, **options).images


@pytest.mark.parametrize("case", OPTIONS)
def test_a_gated_mixed_batch_is_each_prompt_on_its_cut_expert(case, folder):
    make = tiny_pipelines.sd_pipeline if case.startswith("sd") else tiny_pipelines.flux_pipeline
    pipe = make(folder)
    pipe.set_progress_bar_config(disable=True)
    model = denoiser(pipe)
    gates, plans = experts_of(model)
    prompts, experts = ["a cat", "red fox"], [1, 0]
    with RowGates(model) as rows:
        rows.set(gates, experts, images_per_prompt=3)
        mixed = draw(pipe, prompts, range(6), images=3, **OPTIONS[case])
    assert not gated_sites(model)
    dense = draw(pipe, prompts, range(6), images=3, **OPTIONS[case])
    for index, (prompt, expert) in enumerate(zip(prompts, experts)):
        small = copy.copy(pipe)
        small.__dict__[denoiser_slot(pipe)] = gp.cut(copy.deepcopy(model), plans[expert])
        alone = draw(small, [prompt], range(3 * index, 3 * index + 3), images=3, **OPTIONS[case])
        own = mixed[3 * index : 3 * index + 3]
        assert torch.allclose(own, alone, atol=1e-4, rtol=1e-4)
        assert (own - dense[3 * index : 3 * index + 3]).abs().max() > 1e-2


def test_the_same_structure_can_be_set_twice_and_follows_the_dtype():
    model = tiny_hosts.sd_unet().eval()
    family, point = family_of(model), family_of(model).operating_point(model, batch=2)
    inputs = family.example_inputs(model, point, "cpu", torch.float32)
    gates, _ = experts_of(model)
    before = {name: value.clone() for name, value in gates.items()}
    with RowGates(model) as rows, torch.no_grad():
        rows.set(gates, [0, 1])
        first = model(**inputs).sample
        rows.open()
        dense = model(**inputs).sample
        rows.set(gates, [0, 1])
        again = model(**inputs).sample
        assert torch.equal(first, again) and not torch.equal(first, dense)
        model.to(torch.bfloat16)
        half = family.example_inputs(model, point, "cpu", torch.bfloat16)
        assert model(**half).sample.dtype == torch.bfloat16
    assert all(torch.equal(gates[name], before[name]) for name in gates)
    model.float()


def test_open_is_the_dense_model_to_the_bit():
    model = tiny_hosts.flux().eval()
    inputs = family_of(model).example_inputs(model, family_of(model).operating_point(model), "cpu", torch.float32)
    with torch.no_grad():
        dense = model(**inputs)[0]
        gates, _ = experts_of(model)
        with RowGates(model) as rows:
            assert torch.equal(model(**inputs)[0], dense)
            rows.set(gates, [1])
            assert not torch.equal(model(**inputs)[0], dense)
            rows.open()
            assert torch.equal(model(**inputs)[0], dense)
        assert torch.equal(model(**inputs)[0], dense)


def test_rows_that_do_not_fit_are_an_error():
    model = tiny_hosts.sd_unet().eval()
    inputs = family_of(model).example_inputs(
        model, family_of(model).operating_point(model, batch=3), "cpu", torch.float32
    )
    gates, _ = experts_of(model)
    with RowGates(model) as rows, pytest.raises(PlanMismatch, match="2 rows.*3"):
        rows.set(gates, [0, 1])
        model(**inputs)


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_a_soft_gate_is_linear_in_its_value(kind):
    """The release multiplies queries, keys and both halves of a GEGLU: its soft masks bend the output."""
    model = tiny_hosts.sd_unet().eval()
    site = next(iter(find_sites(model).of_kind(kind).values()))
    branch = model.get_submodule(site.path)
    caught = []
    branch.register_forward_hook(lambda module, inputs, output: caught.append(output.detach()))
    inputs = family_of(model).example_inputs(model, family_of(model).operating_point(model), "cpu", torch.float32)
    with torch.no_grad():
        for value in (0.0, 0.5, 1.0):
            gate = torch.ones(site.size)
            gate[0] = value
            with attach_gates(model, {site.name: gate}):
                model(**inputs)
    assert torch.allclose(caught[1], (caught[0] + caught[2]) / 2, atol=1e-6)
    assert (caught[0] - caught[2]).abs().max() > 1e-3
