"""diffusers' `Attention` and `FeedForward`, which several families share: their heads and neurons."""

from __future__ import annotations

from torch import Tensor, nn

from genprune.errors import UnsupportedModel
from genprune.replacements import Tombstone
from genprune.sites import GatePoint, Replacement, Site, SizeAttribute, Slice


class EmptiedAttention(Tombstone):
    """An attention without heads: its output bias at every token, and its residual where it holds one."""

    @classmethod
    def of(cls, removed: nn.Module) -> EmptiedAttention:
        module = cls()
        module.bury(removed, keep=("to_out.0.bias",))
        if removed.to_out[0].bias is not None:
            module.to_out._modules["0"].bias = removed.to_out[0].bias
        module.residual_connection = removed.residual_connection
        module.rescale_output_factor = removed.rescale_output_factor
        return module

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        bias = getattr(self.to_out._modules["0"], "bias", None)
        output = hidden_states.new_zeros(()).expand(hidden_states.shape)  # (B, N, C) or (B, C, H, W)
        if bias is not None:
            output = output + (bias[:, None, None] if hidden_states.ndim == 4 else bias)
        if self.residual_connection:
            output = output + hidden_states
        return output / self.rescale_output_factor


def attention_heads(path: str, attention: nn.Module, parent: str | None) -> Site:
    """The heads of one diffusers `Attention` with a single stream.

    Raises:
        UnsupportedModel: its heads cannot go one by one (grouped keys, or a norm across all heads).
    """
    head_dim = attention.to_q.out_features // attention.heads
    if attention.to_k is None or attention.to_k.out_features != attention.to_q.out_features:
        raise UnsupportedModel(f"'{path}' shares key heads between query heads; its heads cannot be cut one by one.")
    for norm in ("norm_q", "norm_k"):
        weight = getattr(getattr(attention, norm, None), "weight", None)
        if weight is not None and weight.numel() != head_dim:
            raise UnsupportedModel(f"'{path}.{norm}' normalises across heads; cutting a head would change the others.")
    rows = [Slice(f"{path}.{name}", "out", width=head_dim) for name in ("to_q", "to_k", "to_v")]
    return Site(
        path=path,
        kind="heads",
        size=attention.heads,
        gates=(GatePoint(f"{path}.to_out.0", width=head_dim),),
        slices=(*rows, Slice(f"{path}.to_out.0", "in", width=head_dim)),
        attributes=(
            SizeAttribute(path, "heads"),
            SizeAttribute(path, "sliceable_head_dim"),
            SizeAttribute(path, "inner_dim", head_dim),
            SizeAttribute(path, "inner_kv_dim", head_dim),
        ),
        emptied=(Replacement(path, EmptiedAttention.of),),
        parent=parent,
        attention=path,
    )


def feed_forward_neurons(path: str, feed_forward: nn.Module, parent: str | None) -> Site | None:
    """The hidden neurons of one diffusers `FeedForward`: GELU, GELU-approximate, GEGLU and SwiGLU alike."""
    up, hidden = f"{path}.net.0.proj", feed_forward.net[2].in_features
    if not isinstance(getattr(feed_forward.net[0], "proj", None), nn.Linear):
        return None
    halves = feed_forward.net[0].proj.out_features // hidden if hidden else 1  # GLUs hold values, then gates
    return Site(
        path=path,
        kind="neurons",
        size=hidden,
        gates=(GatePoint(f"{path}.net.2"),),
        slices=(
            *(Slice(up, "out", offset=half * hidden) for half in range(halves)),
            Slice(f"{path}.net.2", "in"),
        ),
        parent=parent,
    )
