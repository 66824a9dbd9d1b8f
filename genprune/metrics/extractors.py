"""Networks that turn images into features, each owning its input's dtype, range and size, and its own name.

`FeatureExtractor` wraps any network; `as_extractor` accepts a bare `nn.Module`; `timm_extractor` and
`dinov2_extractor` build one from timm. Inception, CLIP and the extractors that need no model hub have their own files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import cached_property

import torch
from torch import Tensor, nn

from genprune.metrics.errors import BadImages, MissingWeights, need
from genprune.metrics.images import resize, to_unit_floats
from genprune.metrics.result import ExtractorCard

STANDARD_NAMES = frozenset({"inception-v3", "dinov2-vit-l-14", "ViT-L-14-336/openai"})


def weights_hash(module: nn.Module) -> str:
    """`sha256:...` over the module's parameters and buffers, by name, dtype, shape and bytes; device-independent."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


class FeatureExtractor(nn.Module):
    """Features of images from any network, always in eval mode and without gradients.

    Args:
        model: the network.
        name: how results call it; the names of standard extractors are reserved.
        num_features: width D of a feature; default: `model.num_features`.
        image_size: side in px to resize to (bicubic, antialiased), None to leave images as they are.
        mean, std: per channel, applied to values in [0, 1]; the default changes nothing.
        features: from the model and the prepared batch to features of shape `(B, D)` (or `(B, D, 1, 1)`); default:
            call the model.
        official: this is the network that a standard name stands for. Only genprune's own builders set it.

    Raises:
        BadImages: `num_features` is unknown, or `name` belongs to a standard extractor.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        num_features: int | None = None,
        image_size: int | None = None,
        mean: Iterable[float] = (0.0, 0.0, 0.0),
        std: Iterable[float] = (1.0, 1.0, 1.0),
        features: Callable[[nn.Module, Tensor], Tensor] | None = None,
        official: bool = False,
    ):
        super().__init__()
        if name in STANDARD_NAMES and not official:
            raise BadImages(f"the extractor name '{name}' is reserved for the standard weights. Choose another name.")
        if num_features is None:
            num_features = getattr(model, "num_features", None)
        if num_features is None:
            raise BadImages(
                f"{type(model).__name__} has no attribute num_features, so the width of its features is unknown. "
                "Pass FeatureExtractor(model, name, num_features=...)."
            )
        self.model = model
        self.name = name
        self.num_features = int(num_features)
        self.image_size = image_size
        self.resize_mode = "none" if image_size is None else "bicubic-antialias"
        self.official = official
        self._features = features
        # not in the state dict: the hash is of the network's weights alone
        self.register_buffer("_mean", torch.tensor(tuple(mean)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(tuple(std)).view(1, 3, 1, 1), persistent=False)
        self.eval()
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Stay in eval mode: a metric must not depend on what else is training."""
        return super().train(False)

    @cached_property
    def card(self) -> ExtractorCard:
        """Name, weights hash and resize mode, as results carry them. Hashed once, at first use."""
        return ExtractorCard(self.name, weights_hash(self), self.image_size, self.resize_mode, self.official)

    def prepare(self, images: Tensor) -> Tensor:
        """From `(B, 3, H, W)` images (see `to_uint8`) to the network's own input, on the network's device."""
        images = resize(to_unit_floats(images.to(self._mean.device)), self.image_size)
        return (images - self._mean) / self._std

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features in float64.

        Args:
            images: shape `(B, 3, H, W)`, `uint8` or floats in [0, 1].

        Returns:
            Shape `(B, num_features)`, float64, so that everything summed over images is summed in double precision.
        """
        prepared = self.prepare(images)
        output = self.model(prepared) if self._features is None else self._features(self.model, prepared)
        output = output.flatten(1)  # (B, D, 1, 1) -> (B, D)
        if output.shape != (len(images), self.num_features):
            raise BadImages(
                f"extractor '{self.name}' returned features of shape {tuple(output.shape)} for {len(images)} images, "
                f"expected {(len(images), self.num_features)}. Pass features=... that pools to one vector an image."
            )
        return output.double()


def as_extractor(module: nn.Module) -> FeatureExtractor:
    """The module itself when it is a `FeatureExtractor`, otherwise wrapped under its class name.

    A bare module gets `float32` images in [0, 1] at their own size and returns `(B, D)`; it needs `num_features`.
    """
    if isinstance(module, FeatureExtractor):
        return module
    if not isinstance(module, nn.Module):
        raise BadImages(
            f"the extractor is a {type(module).__name__}, expected a torch.nn.Module. "
            "Wrap a network with genprune.metrics.FeatureExtractor(model, name)."
        )
    return FeatureExtractor(module, name=type(module).__name__)


@torch.no_grad()
def extract(extractor: FeatureExtractor, images: Tensor | Iterable[Tensor], batch_size: int = 32) -> Tensor:
    """Features of many images, shape `(N, D)` float64 on the CPU.

    Args:
        extractor: from `as_extractor` or a builder.
        images: one tensor `(N, 3, H, W)`, or an iterable of batches (so that images may stay on disk).
        batch_size: rows a call, for a tensor.
    """
    batches = images.split(batch_size) if isinstance(images, Tensor) else images
    features = [extractor(batch).cpu() for batch in batches]
    if not features:
        raise BadImages("there are no images to extract features from, expected at least one batch.")
    return torch.cat(features)


def _pooled(model: nn.Module, images: Tensor) -> Tensor:
    return model.forward_head(model.forward_features(images), pre_logits=True)


def timm_extractor(
    model: str | nn.Module,
    name: str | None = None,
    image_size: int | None = None,
    features: Callable[[nn.Module, Tensor], Tensor] = _pooled,
    num_features: int | None = None,
    official: bool = False,
) -> FeatureExtractor:
    """Pooled features before the classifier of a timm model, with that model's own mean, std and input size.

    Args:
        model: a timm name, loaded with its pretrained weights, or a model that is already built.
        name: how results call it; default: the timm name or the class name.
        image_size: side in px; default: the model's.
        features: from model and prepared images to `(B, D)`; default: `forward_head(..., pre_logits=True)`.
        num_features: D, where `features` is not the pooled output.
        official: see `FeatureExtractor`.

    Raises:
        MissingWeights: the pretrained weights are neither cached nor reachable.
    """
    timm = need("timm")
    if isinstance(model, str):
        name = name or model
        model = _pretrained_timm(timm, model, image_size)
    config = timm.data.resolve_model_data_config(model)
    return FeatureExtractor(
        model,
        name=name or type(model).__name__,
        num_features=num_features or getattr(model, "head_hidden_size", None) or model.num_features,
        image_size=image_size or config["input_size"][-1],
        mean=config["mean"],
        std=config["std"],
        features=features,
        official=official,
    )


def _pretrained_timm(timm, model: str, image_size: int | None) -> nn.Module:
    sized = {"img_size": image_size} if image_size and model.startswith(("vit_", "eva", "deit")) else {}
    try:
        return timm.create_model(model, pretrained=True, **sized)
    except (OSError, RuntimeError) as error:  # hub errors are OSErrors; timm raises RuntimeError for a bad checkpoint
        raise MissingWeights(
            f"the pretrained weights of timm's '{model}' could not be loaded ({type(error).__name__}). "
            "Run once with a connection to the Hugging Face hub, or pass a built model: timm_extractor(model, name)."
        ) from error


def dinov2_extractor() -> FeatureExtractor:
    """DINOv2 ViT-L/14 at 224 px, class token: the extractor of FD-DINOv2. Fetches 1.2 GB on first use.

    Reference:
        Stein et al., Exposing flaws of generative model evaluation metrics, arXiv 2306.04675.
    """

    def class_token(model: nn.Module, images: Tensor) -> Tensor:
        return model.forward_features(images)[:, 0]  # (B, N, D) -> (B, D), after the last norm

    return timm_extractor(
        "vit_large_patch14_dinov2.lvd142m", "dinov2-vit-l-14", image_size=224, features=class_token, official=True
    )
