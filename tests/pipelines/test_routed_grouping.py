"""Arguments of a stock call by rows, and outputs joined: every entry with its prompt, and in its place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput
from PIL import Image

import genprune as gp
from genprune.pipelines.grouping import joined_outputs, rows_of


def test_texts_go_with_their_prompts_and_one_text_is_for_all():
    rows = rows_of(
        {
            "prompt": ("a", "b", "c"),
            "prompt_2": ["a2", "b2", "c2"],
            "prompt_3": None,
            "negative_prompt": "blur",
            "negative_prompt_2": ["x", "y", "z"],
            "guidance_scale": 4.0,
        }
    )
    assert (rows.prompts, rows.pictures, rows.texts) == (3, 1, ["a", "b", "c"])
    assert rows.of([2, 0]) == {
        "prompt": ["c", "a"],
        "prompt_2": ["c2", "a2"],
        "prompt_3": None,
        "negative_prompt": ["blur", "blur"],
        "negative_prompt_2": ["z", "x"],
        "guidance_scale": 4.0,
    }


def test_lists_that_belong_to_no_prompt_pass_unchanged():
    """Also where they are as long as the list of prompts."""
    shared = {
        "timesteps": [9, 5],
        "sigmas": [1.0, 0.5],
        "original_size": (64, 32),
        "crops_coords_top_left": (0, 0),
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
        "skip_guidance_layers": [7, 8],
        "cross_attention_kwargs": {"scale": 1.0},
        "ip_adapter_image": ["one", "two"],
    }
    assert rows_of({"prompt": ["a", "b"], **shared}).of([1]) == {"prompt": ["b"], **shared}


ENCODED = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_attention_mask",
    "prompt_embeds_mask",
    "prompt_embeds_2",
    "prompt_attention_mask_2",
    "prompt_embeds_pooled",
)


@pytest.mark.parametrize("name", ENCODED)
def test_embeddings_and_masks_by_row(name):
    values = torch.arange(12.0).view(3, 4)
    given = {"prompt_embeds": torch.zeros(3, 2, 2), name: values}
    rows = rows_of(given)
    assert rows.prompts == 3 and rows.texts is None
    assert torch.equal(rows.of([2, 1])[name], values[[2, 1]])
    as_list = rows_of({**given, name: list(values)}).of([1])[name]
    assert len(as_list) == 1 and torch.equal(as_list[0], values[1])
    with pytest.raises(gp.GenpruneError, match=f"{name} has 2 entries; expected 3, one for each prompt. Pass"):
        rows_of({"prompt": ["a", "b", "c"], name: values[:2]})


def test_pictures_stand_prompt_by_prompt():
    """Row 14 of the reference: masks tiled the other way gave prompts each other's."""
    latents, generators = torch.arange(6.0).view(6, 1), [torch.Generator() for _ in range(6)]
    rows = rows_of({"prompt": ["a", "b"], "num_images_per_prompt": 3, "latents": latents, "generator": generators})
    assert rows.pictures_of([1]) == [3, 4, 5]
    second = rows.of([1])
    assert second["prompt"] == ["b"] and second["num_images_per_prompt"] == 3
    assert second["latents"].flatten().tolist() == [3, 4, 5]
    assert all(found is given for found, given in zip(second["generator"], generators[3:], strict=True))
    for name, value in (("latents", latents[:2]), ("generator", generators[:2])):
        with pytest.raises(gp.GenpruneError, match=f"{name} has 2 entries; expected 6, one for each picture"):
            rows_of({"prompt": ["a", "b"], "num_images_per_prompt": 3, name: value})


def test_images_by_prompt_or_one_for_all():
    pictures = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    batch = torch.rand(2, 3, 4, 4)
    rows = rows_of({"prompt": ["a", "b"], "image": pictures, "control_image": batch, "mask_image": pictures[0]})
    found = rows.of([1])
    assert found["image"] == [pictures[1]] and torch.equal(found["control_image"], batch[1:])
    assert found["mask_image"] is pictures[0]
    assert torch.equal(rows_of({"prompt": ["a", "b"], "image": batch[:1]}).of([1])["image"], batch[:1])
    assert np.array_equal(rows_of({"prompt": ["a", "b"], "image": batch.numpy()}).of([1])["image"], batch[1:].numpy())
    # one picture, whose channels or rows are no pictures
    for one in (torch.rand(3, 4, 4), np.zeros((3, 4, 3)), np.zeros((3, 4))):
        assert rows_of({"prompt": ["a", "b", "c"], "image": one}).of([1])["image"] is one
        assert rows_of({"prompt": "a", "image": one}).of([0])["image"] is one
    masks = torch.rand(2, 4, 4)
    assert torch.equal(rows_of({"prompt": ["a", "b"], "mask_image": masks}).of([1])["mask_image"], masks[1:])
    with pytest.raises(gp.GenpruneError, match="image has 3 entries; expected 2"):
        rows_of({"prompt": ["a", "b"], "image": [*pictures, pictures[0]]})


def draws(generators) -> list[float]:
    return [float(torch.rand(1, generator=each)) for each in generators]


def test_one_generator_seeds_one_for_each_picture():
    def generators(count, given=None):
        given = torch.Generator().manual_seed(4) if given is None else given
        return rows_of({"prompt": ["a"] * count, "generator": given}).by_picture["generator"]

    single = torch.Generator().manual_seed(4)
    assert generators(1, single)[0] is single
    three, again, five = draws(generators(3)), draws(generators(3)), draws(generators(5))
    assert three == again and len(set(five)) == 5 and five[:3] == three
    shared = torch.Generator().manual_seed(4)
    other = torch.Generator().manual_seed(8)
    mixed = generators(3, [shared, other, shared])
    assert mixed[1] is other and mixed[0] is not shared and mixed[2] is not shared
    assert draws([mixed[0], mixed[2]]) == draws(generators(2))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompt": []}, "prompt is empty; expected a text or a list"),
        ({"prompt": ["a", None]}, "prompt is .*None.*; expected a text or a list"),
        ({"prompt": None}, "prompt=NoneType and no prompt_embeds; expected"),
        ({"prompt": 3}, "prompt=int and no prompt_embeds"),
        ({"prompt": ["a", "b"], "negative_prompt": ["x"]}, "negative_prompt has 1 entries; expected 2"),
    ],
)
def test_wrong_arguments(given, words):
    with pytest.raises(gp.GenpruneError, match=words):
        rows_of(given)


PLACES = [[1, 3], [0], [2, 4]]


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_outputs_are_joined_in_order(make):
    parts = [make([[place, place] for place in places]) for places in PLACES]
    flags = [[place == 3 for place in places] for places in PLACES]
    outputs = [StableDiffusionPipelineOutput(images=i, nsfw_content_detected=f) for i, f in zip(parts, flags)]
    found = joined_outputs(outputs, PLACES)
    assert type(found) is StableDiffusionPipelineOutput and type(found.images) is type(parts[0])
    assert [int(image[0]) for image in found.images] == [0, 1, 2, 3, 4]
    assert found.nsfw_content_detected == [False, False, False, True, False]
    images, flags = joined_outputs([(i, None) for i in parts], PLACES)
    assert [int(image[1]) for image in images] == [0, 1, 2, 3, 4] and flags is None


def test_fields_without_an_entry_for_each_picture():
    outputs = [(["x", "y"], 7, "a"), (["z"], 7, "b"), (["v", "w"], 7, "c")]
    assert joined_outputs(outputs, PLACES) == (["z", "x", "v", "y", "w"], 7, ["a", "b", "c"])
    single = joined_outputs([FluxPipelineOutput(images=[1, 2])], [[0, 1]])
    assert single.images == [1, 2]
