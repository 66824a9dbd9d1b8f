"""IP-Adapters on a cut model: refused where diffusers would size or number them by the dense configuration."""

from __future__ import annotations

from typing import Any

from torch import nn

from genprune.cutting import pruned_ops, pruned_widths
from genprune.errors import PlanMismatch
from genprune.families import family_of
from genprune.widths import skeleton


def check_attention_whole(model: nn.Module, state_dicts: Any) -> None:
    """Refuse an IP-Adapter where a layer that it hooks into lost heads or went as a whole.

    diffusers sizes the adapter's projections by the dense configuration, splits them among the heads that are left,
    and numbers its files by the attentions that are left: a cut attention would compute something else, silently.

    Args:
        model: a Pruned model.
        state_dicts: what diffusers' loader was given, one adapter or a list of them.

    Raises:
        PlanMismatch: names the first site in the way.
    """
    given = state_dicts if isinstance(state_dicts, (list, tuple)) else [state_dicts]
    # FaceID adapters bring LoRAs that are numbered by all attentions.
    of_all = any("_lora." in name for tensors in given for name in tensors.get("ip_adapter", ()))
    dense = skeleton(family_of(model).build, family_of(model).config(model))
    hooked = [name.removesuffix(".processor") for name in dense.attn_processors if of_all or _is_hooked(name)]
    in_the_way = [
        name
        for name in pruned_widths(model)
        if any(f"{path}.".startswith(f"{name.rpartition(':')[0]}.") for path in hooked)
    ]
    in_the_way += [
        op["path"]
        for op in pruned_ops(model)
        if any(f"{a}.".startswith(f"{b}.") for path in hooked for a, b in ((path, op["path"]), (op["path"], path)))
    ]
    if in_the_way:
        raise PlanMismatch(
            f"an IP-Adapter for the dense model on this {type(model).__name__}, whose attention was cut at "
            f"{len(in_the_way)} sites ('{in_the_way[0]}', ...); expected every attention that it hooks into whole. "
            "Load the IP-Adapter on the dense pipeline, or prune with a plan that leaves those attentions alone, such "
            f"as gp.make_plan(..., protect=({_PROTECTED[type(dense).__name__]!r},))."
        )


# Attentions that diffusers' IP-Adapters hook into, as a pattern of `protect`: what holds them stays too.
_PROTECTED = {
    "UNet2DConditionModel": "*attn2*",
    "FluxTransformer2DModel": "transformer_blocks.*attn*",
    "SD3Transformer2DModel": "*attn*",
}


def _is_hooked(processor: str) -> bool:
    """Whether an adapter hooks into the attention of this processor, by the rules of diffusers' three loaders."""
    return not processor.endswith("attn1.processor") and not processor.startswith("single_transformer_blocks.")
