"""timm's transformers in which single tokens cannot be left out, and why; asked last.

`scripts/list_token_support.py` shows the experiment behind each: one block's output short of some tokens.
"""

from __future__ import annotations

from torch import nn

from genprune.errors import UnsupportedModel

_WINDOWS = "its attention runs in windows cut out of a full grid, which shrinks from stage to stage"
_CHANNELS = (
    "its attention is between channels, so that there is no graph between tokens, and convolutions need the grid"
)
_POOLED = "its attention pools keys and values over a full grid, which shrinks from stage to stage"
_STAGES = "convolutions between or inside its attentions need the full grid"

# module of timm.models -> reason
REASONS = {
    "byobnet": "it is a convolutional network with some attention over its grid",
    "cait": "its attention mixes maps of heads (talking heads), and q and k leave no module",
    "coat": _STAGES,
    "convit": "its attention has positions of the full grid built into the module",
    "cpubone": _STAGES,
    "crossvit": "it runs two sequences of different patch sizes that exchange class tokens",
    "csatv2": _STAGES,
    "davit": _CHANNELS,
    "edgenext": _CHANNELS,
    "efficientformer": _STAGES,
    "efficientformer_v2": _STAGES,
    "efficientvit_mit": _STAGES,
    "efficientvit_msra": _STAGES,
    "fastvit": _STAGES,
    "gcvit": _WINDOWS,
    "gemma4_vit": "its blocks take rotary embeddings by position, and its pooling needs the full grid",
    "hiera": "its tokens are ordered in windows that are pooled between stages",
    "hieradet_sam2": _WINDOWS,
    "iformer": _STAGES,
    "levit": "its attention has a bias by position of the full grid, which shrinks from stage to stage",
    "lowformer": _STAGES,
    "maxxvit": _WINDOWS,
    "metaformer": _STAGES,
    "mobilevit": _STAGES,
    "mvitv2": _POOLED,
    "nest": _WINDOWS,
    "nextvit": _STAGES,
    "pit": "convolutions between its stages need the full grid",
    "pvt_v2": _POOLED,
    "shvit": _STAGES,
    "swiftformer": _STAGES,
    "swin_transformer": _WINDOWS,
    "swin_transformer_v2": _WINDOWS,
    "swin_transformer_v2_cr": _WINDOWS,
    "tiny_vit": _WINDOWS,
    "tnt": "each token has pixels of its own, which a second sequence of all patches carries",
    "twins": _WINDOWS,
    "visformer": _STAGES,
    "volo": "its attention looks at patches around each place of the full grid",
    "xcit": _CHANNELS,
}


def host_of(model: nn.Module) -> None:
    """None for what is no model of timm. Raises `UnsupportedModel` with the reason for what is one."""
    module = type(model).__module__
    reason = REASONS.get(module.removeprefix("timm.models.")) if module.startswith("timm.models.") else None
    if reason is not None:
        raise UnsupportedModel(
            f"tokens of {type(model).__name__} cannot be reduced: {reason}. Expected one sequence of tokens through "
            "all blocks; `docs/tokens-supported.md` lists the classes of timm that have it."
        )
