"""A denoiser whose every call is one node of the autograd graph: recomputed, and differentiated, when backward comes.

Timestep gradient checkpointing (EcoDiff, arXiv 2412.02852): of a chain of T denoiser calls only one call's activations
live at a time. Here it is not the step that is checkpointed but the call inside it. What lies between two calls (input
scaling, guidance, the solver and its history) is ordinary autograd over tensors of the size of the latents: solver
state is carried exactly, a sampler's noise is drawn once, and nothing has to be restored for the recompute.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from genprune.denoising.activation_memory import KeptGraphs, SavedBytes
from genprune.denoising.switches import blocks_checkpointed, frozen
from genprune.errors import GenpruneError

# Relative error of a recomputed prediction. Kernels that do not sum in a fixed order stay far below; a gate drawn
# again is far above.
_REPEATS = 1e-2


class StepGates(Protocol):
    """Gates on a denoiser that may differ from step to step; attached by whoever implements it."""

    def parameters(self) -> list[Tensor]:
        """The leaves to differentiate by, float32."""
        ...

    def set_step(self, step: int) -> None:
        """Put the values of denoising step `step` (solver steps so far, from 0) onto the attached gates.

        In the grad mode in force. The same step must set the same values each time: a call is made twice.
        """
        ...


@dataclass
class Chain:
    """One run of a pipeline: where it is, and how its denoiser is called.

    Args:
        model: the denoiser.
        gates: set before each call; None for a run without.
        graphs: which calls keep their graph; None: all do.
        block_checkpointing: whether a recompute keeps only what goes from block to block.
        steps: in the whole run; known from the first call on.
    """

    model: nn.Module
    gates: StepGates | None
    graphs: KeptGraphs | None
    block_checkpointing: bool = False
    step: int = 0
    steps: int = 0
    calls: int = 0
    reached: bool = False  # whether any gate parameter got a gradient
    logits: tuple[Tensor, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.logits = tuple(self.gates.parameters()) if self.gates is not None else ()
        self.versions = [logit._version for logit in self.logits]

    @property
    def differentiable(self) -> bool:
        return torch.is_grad_enabled() and any(logit.requires_grad for logit in self.logits)

    def set_gates(self, step: int) -> None:
        if self.gates is not None:
            self.gates.set_step(step)

    def keeps_graph(self) -> bool:
        return self.graphs is None or self.graphs.keep_next(self.step, self.steps)


@dataclass
class Call:
    """One call of the denoiser, so that it can be made again. Its tensors live in the graph, not here."""

    chain: Chain
    step: int
    index: int
    structure: Any = field(repr=False)
    leaves: list = field(repr=False)  # arguments, flat; None where a tensor goes
    places: list[int] = field(repr=False)  # indices of the tensors among them
    autocast: tuple[str, bool, torch.dtype] = field(repr=False)
    answer: tuple[Any, list] | None = field(default=None, repr=False)  # structure of the output, its other leaves
    sample: Tensor | None = field(default=None, repr=False)  # some values of the first output

    @classmethod
    def of(cls, chain: Chain, args: tuple, kwargs: dict) -> tuple[Call, list[Tensor]]:
        """The call and its tensors. Containers are taken apart: a host may change its dictionaries later."""
        leaves, structure = tree_flatten((args, kwargs))
        places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[index] for index in places]
        rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        device = next((tensor.device.type for tensor in tensors), "cpu")
        autocast = (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        index, chain.calls = chain.calls, chain.calls + 1
        return cls(chain, chain.step, index, structure, rest, places, autocast), tensors

    def make(self, tensors: tuple[Tensor, ...]) -> list[Tensor]:
        """Set the gates of the call's step and call the denoiser: the tensors of its output."""
        self.chain.set_gates(self.step)
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.structure)
        device, enabled, dtype = self.autocast
        with torch.autocast(device, dtype=dtype, enabled=enabled) if enabled else contextlib.nullcontext():
            output, structure = tree_flatten(self.chain.model(*args, **kwargs))
        self.answer = structure, [None if isinstance(leaf, Tensor) else leaf for leaf in output]
        return [leaf for leaf in output if isinstance(leaf, Tensor)]

    def output(self, tensors: tuple[Tensor, ...]) -> Any:
        """The denoiser's output as it returned it, with these tensors."""
        structure, leaves = self.answer
        given = iter(tensors)
        return tree_unflatten([next(given) if leaf is None else leaf for leaf in leaves], structure)

    def measure(self, tensors: tuple[Tensor, ...]) -> list[Tensor]:
        """Make the call with a graph, count what that saves, and drop it: the one forward serves both."""
        chain = self.chain
        # Later calls carry a gradient to the latents, which this first one has to count as well. Hosts take their
        # sample first; text states and timesteps carry none.
        sample = next((x for x in tensors if x.is_floating_point() and x.ndim > 2), None)
        inputs = tuple(x.detach().requires_grad_(x is sample) for x in tensors)
        with torch.enable_grad(), blocks_checkpointed(chain.model, chain.block_checkpointing):
            with SavedBytes(chain.model, inputs) as saved:
                output = self.make(inputs)
            chain.graphs.measured(saved.total, chain.block_checkpointing)
        return [tensor.detach() for tensor in output]


class CheckpointedCall(torch.autograd.Function):
    """forward: the call without a graph. backward: the call again, and one vector-Jacobian product of it."""

    @staticmethod
    def forward(ctx, call: Call, *given: Tensor) -> tuple[Tensor, ...]:
        inputs = given[: len(call.places)]
        graphs = call.chain.graphs
        output = call.measure(inputs) if graphs is not None and graphs.measures else call.make(inputs)
        ctx.call = call
        call.sample = _sampled(output)
        ctx.save_for_backward(*inputs)  # by reference: text states are shared by all calls
        ctx.mark_non_differentiable(*(tensor for tensor in output if not tensor.is_floating_point()))
        ctx.set_materialize_grads(False)
        return tuple(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *output_grads: Tensor | None) -> tuple:
        call, chain = ctx.call, ctx.call.chain
        _check_unchanged(chain)
        needed = ctx.needs_input_grad[1:]
        inputs = tuple(x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needed))
        wanted = [x for x, need in zip((*inputs, *chain.logits), needed) if need]
        with told_when_full(chain), contextlib.ExitStack() as recompute:
            recompute.enter_context(torch.enable_grad())
            recompute.enter_context(frozen(chain.model))
            if chain.block_checkpointing:
                recompute.enter_context(blocks_checkpointed(chain.model, True))
            output = call.make(inputs)
            _check_repeats(call, output)
            used = [index for index, y in enumerate(output) if output_grads[index] is not None and y.requires_grad]
            grads = [None] * len(wanted)
            if used:
                ends, seeds = [output[index] for index in used], [output_grads[index] for index in used]
                del output
                grads = torch.autograd.grad(ends, wanted, seeds, allow_unused=True)
        found = iter(grads)
        result = [next(found) if need else None for need in needed]
        _check_reached(call, result[len(inputs) :])
        return (None, *result)


class ChainedDenoiser(nn.Module):
    """Stands in a pipeline for its denoiser: everything but a call is the denoiser's own.

    Args:
        chain: the run that it belongs to.
    """

    def __init__(self, chain: Chain):
        super().__init__()
        self.host = chain.model
        self.chain = chain

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("host"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        chain = self.chain
        with told_when_full(chain):
            if not chain.differentiable:
                chain.set_gates(chain.step)
                return chain.model(*args, **kwargs)
            if chain.keeps_graph():
                chain.calls, chain.reached = chain.calls + 1, True
                chain.set_gates(chain.step)
                # Blocks recomputed when backward comes would see the gates of another step.
                with blocks_checkpointed(chain.model, False):
                    return chain.model(*args, **kwargs)
            call, tensors = Call.of(chain, args, kwargs)
            return call.output(CheckpointedCall.apply(call, *tensors, *chain.logits))


@contextlib.contextmanager
def told_when_full(chain: Chain) -> Iterator[None]:
    """Say what to switch on when the memory is full."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if chain.graphs is None:
            advice = 'Pass activation_memory="one call", the default, which keeps the activations of a single call'
        elif chain.graphs.budget_bytes is not None:
            advice = 'Pass a smaller activation_memory, or "one call"'
        elif not chain.block_checkpointing:
            advice = "Pass block_checkpointing=True, which keeps only what goes from block to block"
        else:
            advice = (
                "activation_memory and block_checkpointing are at their least: pass fewer seeds or a smaller image"
            )
        raise GenpruneError(
            f"the memory is full in denoiser call {chain.calls} of {type(chain.model).__name__}. {advice}. ({error})"
        ) from error


@torch.no_grad()
def _sampled(output: list[Tensor]) -> Tensor:
    """Values spread evenly over the first tensor of an output: 256 are enough to know it again."""
    flat = output[0].flatten()
    return flat[:: max(1, flat.numel() // 256)].float()


@torch.no_grad()
def _check_repeats(call: Call, output: list[Tensor]) -> None:
    """Raises `GenpruneError` where a call made again gives something else: its gradient would be that of another."""
    error = float((_sampled(output) - call.sample).norm() / call.sample.norm().clamp_min(1e-30))
    if not error <= _REPEATS:
        raise GenpruneError(
            f"denoiser call {call.index} gave another output when it was made again for its gradient (relative "
            f"difference {error:.1e}); expected the same. Make set_step({call.step}) set the same values each time "
            "(draw noise from a generator seeded by the step), and switch off dropout."
        )


def _check_unchanged(chain: Chain) -> None:
    if [logit._version for logit in chain.logits] != chain.versions:
        raise GenpruneError(
            "gates.parameters() were changed in place after the latents were drawn; expected the values that they "
            "were drawn with. Call backward() before optimizer.step()."
        )


def _check_reached(call: Call, grads: list[Tensor | None]) -> None:
    chain = call.chain
    chain.reached = chain.reached or any(grad is not None for grad in grads)
    if call.index == 0 and not chain.reached:  # backward ends with the first call
        raise GenpruneError(
            f"no call of {type(chain.model).__name__} depends on gates.parameters(); expected attached gates whose "
            "values set_step computes from them. Attach them with genprune.gates.attach_gates(pipe, ...) and set them "
            "with `handle[name] = value`, without detaching."
        )
