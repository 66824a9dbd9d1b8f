"""The arguments of a stock pipeline's call by rows, for a part of the prompts, and the outputs of the parts joined."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genprune.errors import GenpruneError

# `prompt`, `prompt_2`, `negative_prompt_3`: one text for each prompt, or one for all.
_TEXT = re.compile(r"(negative_)?prompt(_\d)?")
# `prompt_embeds`, `negative_pooled_prompt_embeds`, `prompt_attention_mask`, `prompt_embeds_mask_2`, ...
_ENCODED = re.compile(r"(negative_)?(pooled_)?prompt(_embeds|_attention_mask|_mask|_pooled)+(_\d)?")
_ENCODED_NAMES = ("attention_mask", "negative_attention_mask")
_IMAGES = ("image", "images", "mask_image", "control_image", "masked_image_latents", "image_latents")
_COUNT = "num_images_per_prompt"


@dataclass(frozen=True)
class Rows:
    """A call's arguments, sorted by what they belong to. Pictures stand prompt by prompt, as in stock pipelines.

    Args:
        prompts: number of prompts.
        pictures: of each prompt.
        texts: of the prompts; None where only embeddings are given.
        shared: name -> what every prompt gets as it is.
        by_prompt: name -> a list with one entry a prompt, or a tensor with one row a prompt.
        by_picture: the same with one entry a picture.
    """

    prompts: int
    pictures: int
    texts: list[str] | None
    shared: dict[str, Any] = field(repr=False)
    by_prompt: dict[str, Any] = field(repr=False)
    by_picture: dict[str, Any] = field(repr=False)

    def of(self, prompts: Sequence[int]) -> dict[str, Any]:
        """Keyword arguments of a stock call for these prompts."""
        pictures = self.pictures_of(prompts)
        by_prompt = {name: _picked(value, prompts) for name, value in self.by_prompt.items()}
        return {**self.shared, **by_prompt, **{n: _picked(value, pictures) for n, value in self.by_picture.items()}}

    def pictures_of(self, prompts: Sequence[int]) -> list[int]:
        """Indices of the prompts' pictures in the whole output."""
        return [prompt * self.pictures + index for prompt in prompts for index in range(self.pictures)]


def rows_of(arguments: Mapping[str, Any]) -> Rows:
    """Sort the arguments of one call.

    A text that is given once (`negative_prompt="blurry"`) is for every prompt. One generator for several pictures
    seeds a generator of its own for each of them, in order, so that a picture does not depend on which others it is
    drawn with; a generator for one picture is used as it is.

    Args:
        arguments: name -> value, as bound to the stock pipeline's signature.

    Raises:
        GenpruneError: there is neither a prompt nor an embedding, or an argument has another number of entries.
    """
    texts, prompts = _counted(arguments)
    pictures = arguments.get(_COUNT)
    pictures = 1 if pictures is None else int(pictures)
    rows = Rows(prompts, pictures, texts, {}, {}, {})
    for name, value in arguments.items():
        if value is None:
            rows.shared[name] = None
        elif name == "generator":
            rows.by_picture[name] = _generators(value, prompts * pictures)
        elif name == "latents":
            rows.by_picture[name] = _checked(name, value, prompts * pictures, "picture")
        elif _TEXT.fullmatch(name):
            given = [value] * prompts if isinstance(value, str) else list(value)
            rows.by_prompt[name] = _checked(name, given, prompts, "prompt")
        elif _ENCODED.fullmatch(name) or name in _ENCODED_NAMES:
            rows.by_prompt[name] = _checked(name, value, prompts, "prompt")
        elif name in _IMAGES and _pictures(name, value) not in (None, 1):
            rows.by_prompt[name] = _checked(name, value, prompts, "prompt")
        else:
            rows.shared[name] = value
    return rows


def _counted(arguments: Mapping[str, Any]) -> tuple[list[str] | None, int]:
    """The texts, and how many prompts there are."""
    prompt = arguments.get("prompt")
    if isinstance(prompt, str):
        return [prompt], 1
    if isinstance(prompt, (list, tuple)):
        if not prompt or not all(isinstance(text, str) for text in prompt):
            raise GenpruneError(
                f"prompt is {'empty' if not prompt else repr(prompt)[:80]}; expected a text or a list of texts. Pass "
                'prompt="..." or prompt=["...", ...].'
            )
        return list(prompt), len(prompt)
    count = _entries(arguments.get("prompt_embeds"))
    if prompt is None and count:
        return None, count
    raise GenpruneError(
        f"the call has prompt={type(prompt).__name__} and no prompt_embeds; expected a text, a list of texts, or "
        'embeddings. Pass prompt="..." or prompt=["...", ...].'
    )


def _entries(value: Any) -> int | None:
    """Number of rows of a list or of a batch; None for one picture or a scalar."""
    if isinstance(value, (list, tuple)):
        return len(value)
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim > 1:
        return int(value.shape[0])
    return None


def _pictures(name: str, value: Any) -> int | None:
    """Number of pictures; None for one: a tensor (C, H, W) or an array (H, W, C) has no axis of pictures.

    A mask of three dimensions is a batch, as diffusers takes it: (N, H, W).
    """
    least = 3 if name == "mask_image" else 4
    one = isinstance(value, (Tensor, np.ndarray)) and value.ndim < least
    return None if one else _entries(value)


def _checked(name: str, value: Any, expected: int, what: str) -> Any:
    if (found := _entries(value)) != expected:
        raise GenpruneError(
            f"{name} has {'no' if found is None else found} entries; expected {expected}, one for each {what}. Pass "
            f"as many as there are {what}s."
        )
    return value


def _generators(given: Any, pictures: int) -> list[torch.Generator]:
    """One generator a picture, none of them twice."""
    given = list(given) if isinstance(given, (list, tuple)) else [given] * pictures
    _checked("generator", given, pictures, "picture")
    places: dict[int, list[int]] = {}
    for index, generator in enumerate(given):
        places.setdefault(id(generator), []).append(index)
    for indices in places.values():
        source = given[indices[0]]
        if len(indices) > 1:
            seeds = torch.randint(2**63 - 1, (len(indices),), generator=source, device=source.device).tolist()
            for index, seed in zip(indices, seeds):
                given[index] = torch.Generator(source.device).manual_seed(seed)
    return given


def _picked(value: Any, indices: Sequence[int]) -> Any:
    if isinstance(value, Tensor):
        return value[torch.tensor(indices, device=value.device)]
    return value[list(indices)] if isinstance(value, np.ndarray) else [value[index] for index in indices]


# ---- outputs --------------------------------------------------------------------------------------------------------


def joined_outputs(outputs: Sequence[Any], pictures: Sequence[Sequence[int]]) -> Any:
    """One output of the stock class from those of the groups, every picture in its place.

    Args:
        outputs: what the stock calls returned: an output object, or a tuple (`return_dict=False`).
        pictures: for each output the places of its pictures in the whole.

    A field that has no entry for each picture is taken as it is where the groups agree on it, and becomes the list of
    the groups' values where they do not.
    """
    first = outputs[0]
    if isinstance(first, tuple):
        return tuple(_joined([output[index] for output in outputs], pictures) for index in range(len(first)))
    names = [each.name for each in dataclasses.fields(first)]
    return type(first)(**{name: _joined([getattr(o, name) for o in outputs], pictures) for name in names})


def _joined(values: list[Any], pictures: Sequence[Sequence[int]]) -> Any:
    first = values[0]
    batched = isinstance(first, (list, tuple, Tensor, np.ndarray)) and getattr(first, "ndim", 1) > 0
    if not batched or any(len(value) != len(places) for value, places in zip(values, pictures)):
        if len(values) == 1 or all(value is None for value in values):
            return first
        plain = all(isinstance(value, (bool, int, float, str)) for value in values)
        return first if plain and len(set(values)) == 1 else values
    places = [place for group in pictures for place in group]
    order = sorted(range(len(places)), key=places.__getitem__)  # whole output -> where it stands in the groups
    if isinstance(first, Tensor):
        return torch.cat(values)[torch.tensor(order, device=first.device)]
    if isinstance(first, np.ndarray):
        return np.concatenate(values)[order]
    entries = [entry for value in values for entry in value]
    return type(first)(entries[index] for index in order)
