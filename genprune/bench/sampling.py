"""How every candidate draws: steps, guidance, size, precision, and the seed of each image."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from dataclasses import dataclass

import torch

from genprune.bench.candidate import DTYPES
from genprune.errors import GenpruneError


@dataclass(frozen=True)
class Sampling:
    """The same for all candidates of a comparison.

    Attributes:
        num_inference_steps: denoising steps, >= 1.
        guidance_scale: classifier-free guidance (or FLUX's embedded guidance); ignored by pipelines without it.
        seed: of the whole run; see `image_seed`.
        batch_size: images a call. Batches are fixed by the images' global numbers, never by the number of processes.
        height, width: px; None for the pipeline's own default.
        dtype: `float32`, `bfloat16` or `float16`, of pipelines loaded for the run.
    """

    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    seed: int = 0
    batch_size: int = 4
    height: int | None = None
    width: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1 or self.batch_size < 1:
            raise GenpruneError(
                f"num_inference_steps is {self.num_inference_steps} and batch_size is {self.batch_size}, "
                "expected at least 1 of each."
            )
        if self.dtype not in DTYPES:
            raise GenpruneError(f"dtype is '{self.dtype}', expected one of {', '.join(DTYPES)}.")

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


def image_seed(seed: int, index: int) -> int:
    """The seed of image `index` of a run: a hash of both, so that neighbouring runs share no picture.

    It depends on the image's global index alone, hence not on how many processes or batches draw the run.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8], "big") >> 1  # 63 bits


def call_arguments(pipeline, sampling: Sampling, indices: range, prompts: list[str]) -> dict:
    """Keyword arguments of one pipeline call for the images `indices`.

    The noise comes from one CPU generator an image, so that neither the device nor the batch changes it.
    """
    known = inspect.signature(pipeline.__call__).parameters
    arguments = {
        "prompt": prompts,
        "num_inference_steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
        "height": sampling.height,
        "width": sampling.width,
        "generator": [torch.Generator("cpu").manual_seed(image_seed(sampling.seed, i)) for i in indices],
    }
    return {name: value for name, value in arguments.items() if name in known and value is not None}
