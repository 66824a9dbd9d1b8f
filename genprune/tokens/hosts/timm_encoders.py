"""timm's encoders of vision-language models, `Qwen3VitEncoder` and `DeepseekVitEncoder`, and classifiers of them.

Patches are joined in squares after the blocks, so that these models always get the full grid back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from genprune.tokens.hosts.timm_vit import TimmViT


@dataclass
class TimmEncoder(TimmViT):
    """An encoder alone."""

    bias_argument: ClassVar[str | None] = None
    needs_grid: ClassVar[bool] = True

    @property
    def merges(self) -> bool:
        return False  # blocks take no bias, and what comes after takes patches as they are


@dataclass
class TimmEncoderClassifier(TimmEncoder):
    """A classifier around one."""

    trunk_path: ClassVar[str] = "encoder."


def host_of(model: nn.Module) -> TimmViT | None:
    try:
        from timm.models.deepseek_vit import DeepseekVitClassifier, DeepseekVitEncoder
        from timm.models.qwen3_vit import Qwen3VitClassifier, Qwen3VitEncoder
    except ModuleNotFoundError:
        return None
    if isinstance(model, (Qwen3VitClassifier, DeepseekVitClassifier)):
        return TimmEncoderClassifier(model)
    return TimmEncoder(model) if isinstance(model, (Qwen3VitEncoder, DeepseekVitEncoder)) else None
