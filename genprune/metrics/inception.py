"""The Inception-v3 of FID and KID, in torch-fidelity's port; its weights are read as plain tensors only."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from genprune.metrics.errors import BadImages, MissingWeights, need
from genprune.metrics.extractors import FeatureExtractor
from genprune.metrics.images import resize, to_uint8

WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_FILE}"
RESIZE_MODES = ("bicubic", "bilinear")


class InceptionExtractor(FeatureExtractor):
    """The standard 2,048-d Inception features.

    Args:
        weights: a `.pth` or `.safetensors` file with torch-fidelity's tensor names. Default: the file in torch's hub
            cache, downloaded once (91 MB).
        resize_mode: `bicubic` resizes as clean-fid does (antialiased, to 299 px) and rounds to 8 bits, which this
            network asks for; `bilinear` gives exactly torchmetrics' own `FrechetInceptionDistance`. Results name it.

    Raises:
        MissingWeights: the file is missing, unreadable, or not reachable offline.
        ModuleNotFoundError: torchmetrics or torch-fidelity is not installed.
    """

    def __init__(self, weights: str | os.PathLike | None = None, resize_mode: str = "bicubic"):
        if resize_mode not in RESIZE_MODES:
            raise BadImages(f"resize_mode is '{resize_mode}', expected one of {RESIZE_MODES}.")
        network, official, label = _build(weights)
        super().__init__(network, label, num_features=2048, image_size=299, official=official)
        self.resize_mode = "bicubic-antialias-8bit" if resize_mode == "bicubic" else "bilinear-antialias"

    def prepare(self, images: Tensor) -> Tensor:
        images = to_uint8(images.to(self._mean.device))
        if self.resize_mode == "bilinear-antialias":
            return images  # the network resizes by itself
        return resize(images.float(), self.image_size).round().clamp(0, 255).to(torch.uint8)


def _build(weights: str | os.PathLike | None) -> tuple[nn.Module, bool, str]:
    need("torch_fidelity", "torch-fidelity")
    from torchmetrics.image.fid import NoTrainInceptionV3

    path = _hub_file() if weights is None else Path(weights)
    state = _read(path)
    official = path.suffix != ".safetensors" and _sha256(path).startswith("6726825d")
    # The host reads its weights with an unrestricted torch.load. It gets a file that we wrote from plain tensors.
    with tempfile.TemporaryDirectory() as folder:
        clean = os.path.join(folder, "inception.pth")
        torch.save(state, clean)
        try:
            network = NoTrainInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=clean)
        except RuntimeError as error:
            raise MissingWeights(
                f"the tensors in {path} do not fit torch-fidelity's Inception-v3: {str(error).splitlines()[0]} "
                f"Expected the file {WEIGHTS_FILE}."
            ) from error
    network.num_features = 2048
    return network, official, "inception-v3" if official else f"inception-v3-shape:{path.stem}"


def _hub_file() -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(WEIGHTS_URL, str(path), hash_prefix="6726825d", progress=False)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
        raise MissingWeights(
            f"the Inception-v3 weights are not in {path.parent} and could not be downloaded ({error}). "
            f"Put {WEIGHTS_FILE} there, pass weights=FILE, or pass another extractor, "
            "e.g. FID(extractor=genprune.metrics.lite0_extractor())."
        ) from error
    return path


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise MissingWeights(f"there is no Inception weights file {path}, expected a .pth or .safetensors file.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zip and pickle each have their own error for a damaged or unsafe file
        raise MissingWeights(
            f"{path} could not be read as plain tensors ({type(error).__name__}). "
            f"Expected {WEIGHTS_FILE}; delete the file and let genprune download it again."
        ) from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
