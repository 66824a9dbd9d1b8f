"""Draw the same prompts and seeds with a pipeline into a folder: in shares, resumable, never half-written.

A folder holds `00000.png`, `00001.png`, ... , beside each the final latents where the pipeline hands them out, and
`run.json`, which says what they were drawn with. A second run with the same settings draws what is missing; with other
settings it is refused.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from genprune.bench.candidate import fingerprint
from genprune.bench.errors import BadCandidate, RunMismatch
from genprune.bench.sampling import Sampling, call_arguments
from genprune.errors import GenpruneError
from genprune.files import whole_file


def text_hash(texts: Sequence[str]) -> str:
    """`sha256:...` over a list of captions, in order."""
    return "sha256:" + hashlib.sha256(json.dumps(list(texts), ensure_ascii=False).encode()).hexdigest()


def image_path(folder: Path, index: int) -> Path:
    return Path(folder) / f"{index:05d}.png"


def latent_path(folder: Path, index: int) -> Path:
    return Path(folder) / f"{index:05d}.latent.safetensors"


def draw_images(
    pipeline,
    prompts: Sequence[str],
    sampling: Sampling,
    folder: str | Path,
    *,
    process_index: int = 0,
    process_count: int = 1,
    progress: bool = True,
    label: str = "drawing",
) -> int:
    """Draw this process's share of the missing images and return how many were written.

    Batches are consecutive global indices, batch b belongs to process `b % process_count`: which images are computed
    together never depends on the number of processes, so no pixel does. A batch of which any image is missing is drawn
    whole, for the same reason, and only the missing files are written.

    Args:
        pipeline: text-to-image, loaded.
        prompts: one an image.
        sampling: see `Sampling`.
        folder: of this candidate's images.
        process_index, process_count: this process among all.
        progress: show a bar (on the main process).
        label: of the bar.

    Raises:
        BadCandidate: the pipeline takes no prompt.
        RunMismatch: the folder holds images of other prompts, settings or weights.
        GenpruneError: there are no prompts.
    """
    from tqdm.auto import tqdm

    if not prompts:
        raise GenpruneError("there are no prompts to draw, expected at least one. Pass prompts=[...] or a data set.")
    if "prompt" not in inspect.signature(pipeline.__call__).parameters:
        raise BadCandidate(
            f"{type(pipeline).__name__} takes no prompt, expected a text-to-image pipeline of Diffusers."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, pipeline, prompts, sampling)
    with_latents = "callback_on_step_end" in inspect.signature(pipeline.__call__).parameters
    size = sampling.batch_size
    batches = [range(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)]
    mine = batches[process_index::process_count]
    pending = [batch for batch in mine if any(_missing(folder, i, with_latents) for i in batch)]

    written = 0
    quiet = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**{**quiet, "disable": True})  # one bar over images, none over steps
    try:
        with tqdm(total=sum(map(len, mine)), desc=label, unit="image", disable=not progress) as bar:
            bar.update(sum(map(len, mine)) - sum(map(len, pending)))
            for batch in pending:
                images, latents = _draw(pipeline, prompts, sampling, batch, with_latents)
                for row, index in enumerate(batch):
                    if _missing(folder, index, with_latents):
                        _write(folder, index, images[row], None if latents is None else latents[row])
                        written += 1
                bar.update(len(batch))
    finally:
        pipeline.set_progress_bar_config(**quiet)
    return written


def complete(folder: str | Path, count: int) -> bool:
    """Whether all `count` images are there and readable."""
    return not any(_missing(Path(folder), index, False) for index in range(count))


def load_image(folder: str | Path, index: int) -> torch.Tensor:
    """Image `index` of a folder, `uint8`, shape `(3, H, W)`."""
    import numpy as np
    from PIL import Image

    with Image.open(image_path(Path(folder), index)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def load_latent(folder: str | Path, index: int) -> torch.Tensor | None:
    """Final latents of image `index`, float32, or None where the pipeline hands none out."""
    from safetensors.torch import load_file

    path = latent_path(Path(folder), index)
    return load_file(path)["latent"] if path.is_file() else None


@torch.no_grad()
def _draw(pipeline, prompts: Sequence[str], sampling: Sampling, batch: range, with_latents: bool):
    arguments = call_arguments(pipeline, sampling, batch, [prompts[i] for i in batch])
    final = {}
    if with_latents:

        def keep(_pipeline, _step, _timestep, tensors):
            final.update(tensors)
            return tensors

        arguments |= {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": ["latents"]}
    images = pipeline(**arguments, output_type="pil").images
    return images, final["latents"].detach().float().cpu() if with_latents else None


def _write(folder: Path, index: int, image, latent: torch.Tensor | None) -> None:
    from safetensors.torch import save_file

    if latent is not None:  # before the picture: a picture on disk means that everything of it is
        with whole_file(latent_path(folder, index)) as temporary:
            save_file({"latent": latent.contiguous()}, temporary)
    with whole_file(image_path(folder, index)) as temporary:
        image.save(temporary, "PNG")


def _missing(folder: Path, index: int, with_latents: bool) -> bool:
    from PIL import Image

    path = image_path(folder, index)
    if not path.is_file() or (with_latents and not latent_path(folder, index).is_file()):
        return True
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError):  # PIL raises SyntaxError for a broken PNG
        return True
    return False


def _claim(folder: Path, pipeline, prompts: Sequence[str], sampling: Sampling) -> None:
    """Write `run.json`, or compare with the one that is there."""
    record = {
        "format_version": 1,
        "count": len(prompts),
        "prompts": text_hash(prompts),
        "sampling": sampling.to_json(),
        "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_config": {
            name: value for name, value in sorted(pipeline.scheduler.config.items()) if not name.startswith("_")
        },
        "weights": fingerprint(pipeline),
    }
    record = json.loads(json.dumps(record, default=str))
    path = folder / "run.json"
    if path.is_file():
        try:
            found = json.loads(path.read_text())
        except json.JSONDecodeError:
            found = {}
        differing = sorted(name for name in record if found.get(name) != record[name])
        if differing:
            raise RunMismatch(
                f"{folder} holds images of another run (differing: {', '.join(differing)}). "
                "Choose another output folder, or delete this one to draw it anew."
            )
        return
    if any(folder.glob("*.png")):
        raise RunMismatch(
            f"{folder} holds pictures but no run.json, so they cannot be trusted. Choose another folder."
        )
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")
