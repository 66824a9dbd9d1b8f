"""Small real networks for the metrics' tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TinyNet(nn.Module):
    """A convolution and a mean: 12 features an image, any image size, no state beside its weights."""

    num_features = 12

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.filter = nn.Conv2d(3, 12, 5, stride=3)
        with torch.no_grad():
            for tensor in self.parameters():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.4)

    def forward(self, images: Tensor) -> Tensor:
        return self.filter(images).tanh().mean(dim=(2, 3))


def pictures(count: int, seed: int, low: int = 0, high: int = 256, side: int = 24) -> Tensor:
    """Random `uint8` pictures with large patches, so that they differ in more than noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(low, high, (count, 3, side // 6, side // 6), generator=generator, dtype=torch.uint8)
    return coarse.repeat_interleave(6, 2).repeat_interleave(6, 3)


def tiny_clip():
    """An open_clip model of two layers a tower with random weights, and open_clip's real tokenizer."""
    import open_clip
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    model = CLIP(
        embed_dim=16,
        vision_cfg=CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=24),
        text_cfg=CLIPTextCfg(context_length=77, vocab_size=49408, width=16, heads=2, layers=2),
    )
    return model, open_clip.SimpleTokenizer()
