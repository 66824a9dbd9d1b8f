"""diffusers' attention and feed-forward, which several families share: their heads, neurons and branches."""

from __future__ import annotations

from torch import Tensor, nn

from genprune.errors import UnsupportedModel
from genprune.replacements import PassThrough, Tombstone, ZeroOutput
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


class EmptiedJointAttention(EmptiedAttention):
    """A joint attention without heads: the output bias of either stream at every token of it."""

    @classmethod
    def of(cls, removed: nn.Module) -> EmptiedJointAttention:
        module = cls()
        module.bury(removed, keep=("to_out.0.bias", "to_add_out.bias"))
        for name, layer in (("to_out.0", removed.to_out[0]), ("to_add_out", getattr(removed, "to_add_out", None))):
            if getattr(layer, "bias", None) is not None:
                module.get_submodule(name).bias = layer.bias
        return module

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        # Both streams have the block's width; a stream that ends here (`context_pre_only`) is not read by the host.
        context = self.to_add_out if hasattr(self, "to_add_out") else None
        return _bias_of(self.to_out._modules["0"], hidden_states), _bias_of(context, encoder_hidden_states)


def _bias_of(layer: nn.Module | None, like: Tensor) -> Tensor:
    zeros = like.new_zeros(()).expand(like.shape)
    bias = getattr(layer, "bias", None)
    return zeros + bias if isinstance(bias, nn.Parameter) else zeros


class ZeroJointOutput(ZeroOutput):
    """A removed joint attention: zeros for either stream."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return tuple(x.new_zeros(()).expand(x.shape) for x in (hidden_states, encoder_hidden_states))


def check_attention(path: str, attention: nn.Module) -> None:
    """Refuse an attention whose heads cannot go one by one.

    Raises:
        UnsupportedModel: grouped keys, a norm across all heads, fused projections, or an adapter's own projections.
    """
    head_dim = attention.to_q.out_features // attention.heads
    if attention.to_k is None or attention.to_k.out_features != attention.to_q.out_features:
        raise UnsupportedModel(
            f"'{path}' shares key heads between query heads ({attention.to_q.out_features} query features); expected "
            "as many key features. Its heads cannot be cut one by one; pass another model."
        )
    for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        weight = getattr(getattr(attention, norm, None), "weight", None)
        if weight is not None and weight.numel() not in (0, head_dim):  # 0: an operator stands there
            raise UnsupportedModel(
                f"'{path}.{norm}' normalises {weight.numel()} features, across heads of {head_dim}; expected a norm "
                "within each head, because cutting a head would change the others. Pass another model."
            )
    processor = getattr(attention, "processor", None)
    legacy = hasattr(attention, "residual_connection")  # unfusing the older class only swaps its processor back
    fused = type(processor).__name__.startswith("Fused") if legacy else getattr(attention, "fused_projections", False)
    if fused:
        raise UnsupportedModel(
            f"'{path}' computes with fused projections; expected separate ones. Call model.unfuse_qkv_projections() "
            "first; fuse again after the cut."
        )
    if isinstance(processor, nn.Module) and next(processor.parameters(), None) is not None:
        raise UnsupportedModel(
            f"'{path}' has a processor with its own weights ({type(processor).__name__}, an image-prompt adapter?); "
            "expected a plain one. Call pipe.unload_ip_adapter() first."
        )


def head_projections(path: str, attention: nn.Module) -> tuple[Slice, ...]:
    """The rows of every projection that feeds the heads, of one stream or two."""
    head_dim = attention.to_q.out_features // attention.heads
    names = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    present = [name for name in names if getattr(attention, name, None) is not None]
    return tuple(Slice(f"{path}.{name}", "out", width=head_dim) for name in present)


def head_numbers(path: str, attention: nn.Module, *more: str) -> tuple[SizeAttribute, ...]:
    """The numbers on an attention that follow its heads; `more` names those that count features."""
    head_dim = attention.to_q.out_features // attention.heads
    counts = [SizeAttribute(path, name) for name in ("heads", "sliceable_head_dim") if hasattr(attention, name)]
    widths = [name for name in ("inner_dim", "inner_kv_dim", *more) if hasattr(attention, name)]
    return (*counts, *(SizeAttribute(path, name, head_dim) for name in widths))


def attention_heads(path: str, attention: nn.Module, parent: str | None, joint: bool = False) -> Site:
    """The heads of one diffusers attention, gated at its output projection, or at both where it joins two streams.

    Args:
        joint: whether it returns one output for each of two streams (MMDiT).

    Raises:
        UnsupportedModel: its heads cannot go one by one, see `check_attention`.
    """
    check_attention(path, attention)
    head_dim = attention.to_q.out_features // attention.heads
    consumers = [f"{path}.to_out.0"]
    if joint and getattr(attention, "to_add_out", None) is not None:
        consumers.append(f"{path}.to_add_out")
    return Site(
        path=path,
        kind="heads",
        size=attention.heads,
        gates=tuple(GatePoint(consumer, width=head_dim) for consumer in consumers),
        slices=(
            *head_projections(path, attention),
            *(Slice(consumer, "in", width=head_dim) for consumer in consumers),
        ),
        attributes=head_numbers(path, attention),
        emptied=(Replacement(path, EmptiedJointAttention.of if joint else EmptiedAttention.of),),
        parent=parent,
        attention=path,
    )


def residual_branch(path: str, parent: str | None, joint: bool = False, norm: str | None = None) -> Site:
    """A sub-layer whose output is added to the residual, as a whole.

    Args:
        joint: whether it returns one output for each of two streams.
        norm: path of the norm that only this sub-layer reads; leaves with it.
    """
    emptied = [Replacement(path, ZeroJointOutput.of if joint else ZeroOutput.of)]
    if norm is not None:
        emptied.append(Replacement(norm, PassThrough.of))
    return Site(
        path=path,
        kind="branch",
        size=1,
        gates=(GatePoint(path, side="output", width=0),),
        emptied=tuple(emptied),
        parent=parent,
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
