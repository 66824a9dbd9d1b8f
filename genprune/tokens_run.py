"""Fewer tokens in a model as a user names it, compared with all of them: what `genprune tokens` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genprune.errors import BadCalibrationData, GenpruneError, nearest
from genprune.families import denoiser
from genprune.model_source import ModelSource
from genprune.prune_run import disk_errors
from genprune.tokens.handle import TokenHandle, prune_tokens
from genprune.tokens.latency import Timing
from genprune.tokens.methods import TokenMethod, ToMe, ZeroTPrune
from genprune.tokens.presets import TokenPreset, read
from genprune.tokens.proxies import agreement, as_batches, distance_between, outputs
from genprune.tokens.search import search_tokens
from genprune.untouched import untouched

METHODS: dict[str, Callable[..., TokenMethod]] = {
    "zero_tprune": ZeroTPrune,
    "zero_tprune_published": ZeroTPrune.published,
    "tome": ToMe,
}
RANDOM_IMAGES = 16  # where none are given
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class TokensResult:
    """What `genprune tokens` prints.

    Attributes:
        model: as it was named, with its class.
        method: in JSON, with counts written out.
        report: of the handle, in JSON.
        report_text: the same to read.
        latency: share of the dense time, in JSON; None where it was not measured.
        images: what the outputs were compared on, in words; empty where they were not.
        agreement: share of images with the same class as before; None for a model without classes.
        feature_distance: 1 - cosine of the outputs, mean over images.
        search: in JSON; None where there was none.
        search_text: the same to read.
        saved: file of the preset.
    """

    model: str
    method: dict[str, Any]
    report: dict[str, Any]
    report_text: str
    latency: dict[str, Any] | None
    images: str
    agreement: float | None
    feature_distance: float | None
    search: dict[str, Any] | None = None
    search_text: str = ""
    saved: str | None = None

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {"format_version": 1} | {name: values[name] for name in values if not name.endswith("_text")}

    def lines(self) -> list[str]:
        """The result to read."""
        told = [self.model, self.report_text]
        if self.search_text:
            told[1:1] = [self.search_text]
        if self.latency is not None:
            took = self.latency
            told.append(
                f"measured now: {took['share']:.3f} of the dense time ({took['low']:.3f} to {took['high']:.3f}), "
                f"batch {took['batch_size']}, {took['device']}"
            )
        if self.feature_distance is not None:
            told.append(f"on {self.images}: features at 1 - cosine = {self.feature_distance:.5f} from the dense ones")
        if self.agreement is not None:
            told.append(f"on {self.images}: the same class for {self.agreement:.1%}")
        if self.saved:
            told.append(f"preset written to {self.saved}; use it with:  genprune.prune_tokens(model, {self.saved!r})")
        return told


def method_named(name: str, **settings: Any) -> TokenMethod:
    """A token method by its name on the command line. Raises `GenpruneError`."""
    if name not in METHODS:
        raise GenpruneError(
            f"no token method {name!r}{nearest(name, METHODS)}; expected one of {', '.join(METHODS)}. Pass --method."
        )
    return METHODS[name](**settings)


def read_layers(text: str | None) -> tuple[int, ...] | None:
    """`2,5,8` as a tuple. Raises `GenpruneError`."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise GenpruneError(
            f"--layers {text!r} is no list of layers; expected whole numbers from 0 with commas. Pass --layers 2,5,8."
        ) from None


def read_counts(text: str) -> dict[int, float | int]:
    """`2:0.9,5:120` as `{2: 0.9, 5: 120}`. Raises `GenpruneError`."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return {int(layer): float(value) if "." in value else int(value) for layer, value in pairs}
    except ValueError:
        raise GenpruneError(
            f"--counts {text!r} are no counts; expected LAYER:SHARE or LAYER:COUNT with commas. Pass "
            "--counts 2:0.9,5:120."
        ) from None


def reduce_source(
    source: ModelSource,
    chosen: TokenMethod | str,
    *,
    images: Path | None = None,
    count: int = 64,
    random_weights: bool = False,
    search: bool = False,
    trials: int = 100,
    seconds: float | None = None,
    save: Path | None = None,
    timing: Timing | None = None,
    latency: bool = True,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> TokensResult:
    """Reduce a model's tokens and compare it with itself with all of them.

    Args:
        source: the model.
        chosen: a method; or the path of a preset, or a published one's name.
        images: a folder of pictures. None: noise.
        count: pictures at most.
        random_weights: a timm model as it is before training: for costs and times alone.
        search: find counts on the images first.
        trials, seconds, seed: of the search.
        save: write the preset there.
        timing: of latency.
        latency: measure the share of the dense time.
        say: told what is going on, one line a step.

    Raises:
        GenpruneError: the model is not supported, the budget cannot be met, the images cannot be read, or the preset
        cannot be written.
    """
    timing = timing or Timing()
    method = read(chosen) if isinstance(chosen, str) else chosen
    if search and isinstance(method, TokenPreset):
        raise GenpruneError(
            "--search and --preset are both given; expected one of them: a preset has its counts. Leave one out."
        )
    if images is not None and not images.is_dir():
        raise BadCalibrationData(f"'{images}' is no folder; expected one with pictures. Check --images.")
    say(f"Loading {source.name}" + (" with random weights" if random_weights else ""))
    target = _untrained(source, seed) if random_weights else source.load(device)
    target = target.to(device)
    model = denoiser(target)
    if isinstance(model, nn.Module):
        model.eval()
    pictures, told = _pictures(model, images, count, seed)
    found = None
    if search:
        if pictures is None:
            raise GenpruneError(
                f"--search compares features of images, and '{source.name}' is no image model of timm; expected one. "
                "Leave --search out."
            )
        say(f"Searching: {trials} trials on {told}")
        settings = {"trials": trials, "seconds": seconds, "timing": timing, "seed": seed, "progress": progress}
        found = search_tokens(target, pictures, method, **settings)
        method = found.preset
    dense = None if pictures is None else _both(model, pictures)
    with prune_tokens(target, method, timing=timing) as handle:
        result = TokensResult(
            model=f"{source.name}: {type(model).__name__}",
            method=handle.preset().method.to_json() if hasattr(handle, "preset") else handle.method.to_json(),
            report=_as_json(handle.report()),
            report_text=str(handle.report()),
            latency=_timed(handle, say) if latency else None,
            images="" if dense is None else told,
            agreement=None,
            feature_distance=None,
            search=None if found is None else found.to_json(),
            search_text="" if found is None else str(found),
        )
        if dense is not None:
            now = _both(model, pictures)
            same = None if dense[1] is None else agreement(dense[1], now[1])
            distance = distance_between(dense[0], now[0], "cosine")
            result = dataclasses.replace(result, agreement=same, feature_distance=distance)
        if save is not None:
            preset = handle.preset() if found is None else found.preset
            with disk_errors(save):
                preset.save(save)
            result = dataclasses.replace(result, saved=str(save))
    return result


def _as_json(report) -> dict[str, Any]:
    return report.to_json() if hasattr(report, "to_json") else dataclasses.asdict(report)


def _timed(handle: TokenHandle, say: Callable[[str], None]) -> dict[str, Any] | None:
    say("Timing dense and reduced in turns (--no-latency leaves it out)")
    try:
        return dataclasses.asdict(handle.measure())
    except RuntimeError as error:  # an operation that the device lacks, or out of memory
        say(f"Latency is not measured: {str(error).strip().splitlines()[0]}")
        return None


def _untrained(source: ModelSource, seed: int) -> nn.Module:
    import timm

    if source.kind != "timm" or Path(source.place).is_dir():
        raise GenpruneError(
            f"--random-weights is for a timm name, and '{source.name}' has weights of its own. Leave it out."
        )
    torch.manual_seed(seed)
    return timm.create_model(source.place, pretrained=False)


def _both(model: nn.Module, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
    """Pooled features, and logits where there are classes."""
    batches = as_batches(pictures, 16)
    with untouched(model), torch.inference_mode():
        logits = outputs(model, batches, "kl") if getattr(model, "num_classes", 0) else None
        return outputs(model, batches, "cosine"), logits


def _pictures(model: nn.Module, folder: Path | None, count: int, seed: int) -> tuple[Tensor | None, str]:
    """Images as the model wants them, and what they are in words; None for what is no image model."""
    if not hasattr(model, "forward_features"):
        return None, ""
    from timm.data import create_transform, resolve_model_data_config

    settings = resolve_model_data_config(model)
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None) or settings["input_size"][1:]
    channels = getattr(model, "in_chans", None) or settings["input_size"][0]
    if folder is None:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(min(count, RANDOM_IMAGES), channels, *size, generator=generator)
        return noise, f"{len(noise)} images of noise (no --images: says little about real ones)"
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _PICTURES)[:count]
    if not files:
        raise BadCalibrationData(
            f"'{folder}' holds no pictures; expected files ending in {', '.join(_PICTURES)}. Check --images."
        )
    transform = create_transform(**{**settings, "input_size": (channels, *size)}, is_training=False)
    return torch.stack([_opened(file, transform, channels) for file in files]), f"{len(files)} images of {folder}"


def _opened(file: Path, transform, channels: int) -> Tensor:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return transform(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, ValueError) as error:
        raise BadCalibrationData(
            f"'{file}' cannot be read as a picture ({error}); expected one. Take it out of the folder of --images."
        ) from None
