"""A CLIP model of open_clip as an image extractor that can also embed captions.

open_clip rather than transformers: torchmetrics 1.9's `CLIPScore` crashes under transformers 5, whose
`get_image_features` returns an output object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genprune.metrics.errors import BadImages, MissingWeights, need
from genprune.metrics.extractors import FeatureExtractor


class ClipExtractor(FeatureExtractor):
    """Unit-length CLIP embeddings of images, `(B, D)`, and of captions through `embed_texts`.

    Args:
        model: an open_clip model (`encode_image`, `encode_text`, `visual`).
        tokenizer: from a list of captions to token ids, shape `(B, T)`.
        name: how results call it, e.g. `ViT-B-32/laion2b_s34b_b79k`.
        image_size, mean, std: default: the model's own preprocessing.
        official: see `FeatureExtractor`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[Sequence[str]], Tensor],
        name: str,
        image_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        official: bool = False,
    ):
        clip = need("open_clip", "open-clip-torch")
        own_size = getattr(model.visual, "image_size", None)
        own_size = own_size[0] if isinstance(own_size, tuple | list) else own_size
        with torch.no_grad():
            width = model.encode_text(tokenizer(["width"]).to(next(model.parameters()).device)).shape[-1]
        super().__init__(
            model,
            name=name,
            num_features=width,
            image_size=image_size or own_size,
            mean=mean or getattr(model.visual, "image_mean", None) or clip.OPENAI_DATASET_MEAN,
            std=std or getattr(model.visual, "image_std", None) or clip.OPENAI_DATASET_STD,
            features=lambda model, images: F.normalize(model.encode_image(images).double(), dim=-1),
            official=official,
        )
        self.tokenizer = tokenizer

    @torch.no_grad()
    def embed_texts(self, captions: Sequence[str]) -> Tensor:
        """Unit-length embeddings of captions, shape `(B, D)`, float64. Captions are cut at the model's length."""
        if isinstance(captions, str):
            raise BadImages("captions is one string, expected a list with one caption per image. Pass [caption].")
        tokens = self.tokenizer(list(captions)).to(self._mean.device)
        return F.normalize(self.model.encode_text(tokens).double(), dim=-1)


def open_clip_extractor(name: str, pretrained: str) -> ClipExtractor:
    """A pretrained CLIP by open_clip's model name and weights tag, e.g. `("ViT-B-32", "laion2b_s34b_b79k")`.

    Raises:
        MissingWeights: the weights are neither cached nor reachable, or open_clip does not know the pair.
    """
    clip = need("open_clip", "open-clip-torch")
    # OpenAI's weights were trained with the quick GELU; open_clip only warns when they meet the ordinary one
    network = f"{name}-quickgelu" if pretrained == "openai" and not name.endswith("-quickgelu") else name
    try:
        model = clip.create_model(network, pretrained=pretrained)
        tokenizer = clip.get_tokenizer(network)
    except (OSError, RuntimeError) as error:  # unknown names and unreachable hubs alike
        raise MissingWeights(
            f"CLIP weights '{pretrained}' of '{name}' could not be loaded ({type(error).__name__}). "
            "Run once with a connection to the Hugging Face hub, see open_clip.list_pretrained() for names, "
            "or pass your own: ClipExtractor(model, tokenizer, name)."
        ) from error
    label = f"{name.removesuffix('-quickgelu')}/{pretrained}"
    return ClipExtractor(model, tokenizer, label, official=label == "ViT-L-14-336/openai")
