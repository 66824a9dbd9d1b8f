"""Run a stock pipeline so that its final latents can be differentiated by gates on its denoiser."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genprune.denoising.activation_memory import KeptGraphs, memory_bytes
from genprune.denoising.capture import checked_prompts, for_rows, quiet_copy, takes_prompts
from genprune.denoising.checkpointing import Chain, ChainedDenoiser, StepGates, told_when_full
from genprune.denoising.switches import frozen
from genprune.errors import GenpruneError, nearest
from genprune.families import denoiser_slot

# Options of a pipeline that are decided here, and what to use instead.
_DECIDED = {
    "prompt": "Pass prompts=[...]",
    "generator": "Pass seeds=[...], one for each row",
    "latents": "Pass seeds=[...], one for each row",
    "batch_size": "Pass as many seeds as rows",
    "num_images_per_prompt": "Repeat prompts, and pass one seed for each",
    "output_type": "The final latents are returned",
    "return_dict": "The final latents are returned",
    "callback_on_step_end": "Draw with the pipeline itself to watch its steps",
}


class _LastStep(Exception):
    """Ends a pipeline after its last solver step, before it decodes."""


def draw_latents(
    pipe,
    prompts: Sequence[str] | None = None,
    *,
    seeds: Sequence[int],
    gates: StepGates | None = None,
    activation_memory: int | str | None = "one call",
    block_checkpointing: bool = False,
    whole_chain: bool = False,
    **options: Any,
) -> Tensor:
    """The final latents of a stock pipeline, with a graph to the gates on its denoiser.

    The pipeline's own loop runs, on a shallow copy with a scheduler of its own: guidance, solver and noise are what
    they are without gates, and gates of one give the same latents to the bit. Base weights are frozen meanwhile.

    Args:
        pipe: a diffusers pipeline with a `unet` or `transformer`.
        prompts: one for each row; None for a pipeline without prompts.
        seeds: row i starts from `torch.Generator("cpu").manual_seed(seeds[i])`.
        gates: attached gates, set before each call of the denoiser. None: no graph, the dense target.
        activation_memory: what the graphs of denoiser calls may take. "one call": each call is made again in
            backward, so that one call's activations live at a time however many steps there are. A size (bytes, or
            "8GiB"): as many of the last calls as fit keep their graph, which saves their second forward. None: all
            keep it, plain backpropagation.
        block_checkpointing: recompute block by block inside a call: less memory, a third forward.
        whole_chain: return the latents after every solver step, not after the last alone.
        **options: of the pipeline's call: num_inference_steps, guidance_scale, negative_prompt, height, width, ...
            A negative prompt given as one string is repeated for each row.

    Returns:
        Shape `(rows, ...)`, or `(steps, rows, ...)` of the whole chain, as the pipeline's denoiser sees them: float32
        or the pipeline's dtype.

    Raises:
        GenpruneError: an option is unknown, prompts and seeds do not fit, the solver breaks the graph, the latents
            are no longer finite, or the memory is full. Some of it can only show in `backward()`.
    """
    slot = denoiser_slot(pipe)
    if slot is None:
        raise GenpruneError(
            f"{type(pipe).__name__} is a bare model; expected a pipeline that can draw. Pass the pipeline."
        )
    model = getattr(pipe, slot)
    given = _arguments(pipe, prompts, seeds, options)
    chain = Chain(model, gates, _graphs(model, activation_memory, block_checkpointing), block_checkpointing)
    if chain.differentiable:
        _check_repeatable(model, slot)
    run = _Run(pipe, slot, chain)
    with torch.set_grad_enabled(chain.differentiable), frozen(*run.modules(), but=chain.logits):
        # Solvers whose pipeline gives them no generator draw from the global one.
        with torch.random.fork_rng(_cuda_devices()), told_when_full(chain):
            torch.manual_seed(hash(tuple(seeds)))
            latents = run.latents(given)
    if chain.differentiable and not latents.requires_grad:
        raise GenpruneError(
            f"the final latents of {type(pipe).__name__} do not depend on gates.parameters(); expected gates attached "
            f"to pipe.{slot}, and a pipeline that does not detach. Attach them with genprune.gates.attach_gates."
        )
    if whole_chain:
        return torch.stack(run.chain_latents)[:, : len(seeds)]
    return latents[: len(seeds)]  # some pipelines step both halves of guidance


class _Run:
    """One run of a pipeline on a shallow copy of it: the pipeline itself is not changed."""

    def __init__(self, pipe, slot: str, chain: Chain):
        self.pipe, self.chain = pipe, chain
        self.copy = quiet_copy(pipe)
        # Past the pipeline's own setter, which would write the stand-in's class into its configuration.
        self.copy.__dict__[slot] = ChainedDenoiser(chain)
        self.copy.__dict__["_all_hooks"] = []  # the original moves its offloaded models, below
        self.step = self.copy.scheduler.step
        self.chain_latents: list[Tensor] = []

        @functools.wraps(self.step)  # pipelines read from its signature whether a solver takes eta and generator
        def counted(*args: Any, **kwargs: Any) -> Any:
            return self.counted_step(*args, **kwargs)

        self.copy.scheduler.step = counted

    def modules(self) -> list[nn.Module]:
        return [part for part in vars(self.pipe).values() if isinstance(part, nn.Module)]

    def latents(self, given: dict[str, Any]) -> Tensor:
        try:
            # The function below `@torch.no_grad()`.
            inspect.unwrap(type(self.pipe).__call__)(self.copy, **given)
        except _LastStep:
            pass
        finally:
            vars(self.copy.scheduler).pop("step", None)  # it holds this run, which would outlive it in a cycle
            if hasattr(self.pipe, "maybe_free_model_hooks"):
                self.pipe.maybe_free_model_hooks()
        if not self.chain_latents:
            raise GenpruneError(
                f"{type(self.pipe).__name__} made no step of its {type(self.copy.scheduler).__name__}; expected at "
                "least one. Pass num_inference_steps of 1 or more."
            )
        return self.chain_latents[-1]

    def counted_step(self, *args: Any, **kwargs: Any) -> Any:
        output = self.step(*args, **kwargs)
        latents = output[0] if isinstance(output, tuple) else output.prev_sample
        self.chain.step += 1
        self.chain.steps = len(self.copy.scheduler.timesteps)
        if not torch.isfinite(latents).all():
            raise GenpruneError(
                f"the latents are NaN or infinite after step {self.chain.step} of {self.chain.steps} "
                f"({type(self.copy.scheduler).__name__}, {latents.dtype}); expected finite ones. Run the model in "
                "bfloat16 or float32, or lower guidance_scale."
            )
        self._check_connected(args[0] if args else kwargs["model_output"], latents)
        self.chain_latents.append(latents)
        if self.chain.step == self.chain.steps:
            raise _LastStep
        return output

    def _check_connected(self, prediction: Tensor, latents: Tensor) -> None:
        """Raises `GenpruneError` where the solver's step has no gradient to the denoiser's prediction."""
        if not (torch.is_grad_enabled() and prediction.requires_grad):
            return
        if latents.requires_grad:  # backward through one solver step: nothing beside a call of the denoiser
            (grad,) = torch.autograd.grad(latents.sum(), prediction, retain_graph=True, allow_unused=True)
            if grad is not None:
                return
        raise GenpruneError(
            f"{type(self.copy.scheduler).__name__} breaks the graph: the latents after step {self.chain.step} have no "
            "gradient to the denoiser's prediction. Set pipe.scheduler to a solver of plain tensor operations, such "
            "as DDIMScheduler, or FlowMatchEulerDiscreteScheduler for flow models."
        )


def _arguments(pipe, prompts: Sequence[str] | None, seeds: Sequence[int], options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the pipeline's call. Raises `GenpruneError`."""
    name = type(pipe).__name__
    accepted = inspect.signature(inspect.unwrap(type(pipe).__call__)).parameters
    for option in options:
        if option in _DECIDED:
            raise GenpruneError(f"{option} is not an option of draw_latents. {_DECIDED[option]}.")
        if option not in accepted:
            known = [key for key in list(accepted)[1:] if key not in _DECIDED]
            raise GenpruneError(
                f"{name} has no option '{option}'{nearest(option, known)}; expected one of: {', '.join(known)}."
            )
    rows = len(seeds)
    if not rows or any(type(seed) is not int for seed in seeds):
        raise GenpruneError(f"seeds is {seeds!r}; expected at least one integer, one for each row. Pass seeds=[0].")
    given = for_rows(options, rows)
    if takes_prompts(pipe):
        if prompts is not None or "prompt_embeds" not in options:
            given["prompt"] = checked_prompts(pipe, prompts)
            _check_rows("prompts", given["prompt"], rows)
    elif prompts is not None:
        raise GenpruneError(f"{name} takes no prompts, got {len(prompts)}. Leave prompts out.")
    if "class_labels" in options:
        _check_rows("class_labels", options["class_labels"], rows)
    decided = {
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        "output_type": "latent" if "vae" in getattr(pipe, "components", {}) else "pt",
    }
    if "prompt" not in given and "prompt_embeds" not in given:
        decided["batch_size"] = rows
    given |= {key: value for key, value in decided.items() if key in accepted}
    needed = [
        key for key, one in list(accepted.items())[1:] if one.default is one.empty and one.kind is not one.VAR_KEYWORD
    ]
    if missing := [key for key in needed if key not in given]:
        raise GenpruneError(f"{name} needs {missing[0]}, which was not given. Pass {missing[0]}=...")
    return given


def _check_rows(what: str, values: Sequence, rows: int) -> None:
    if len(values) != rows:
        raise GenpruneError(f"{len(values)} {what} for {rows} seeds; expected one for each. Pass {rows} of both.")


def _graphs(model: nn.Module, activation_memory: int | str | None, block_checkpointing: bool) -> KeptGraphs | None:
    if block_checkpointing and activation_memory is None:
        raise GenpruneError(
            "block_checkpointing needs calls that are made again, and activation_memory=None keeps all graphs. Pass "
            'activation_memory="one call" with it.'
        )
    if block_checkpointing and not getattr(model, "_supports_gradient_checkpointing", False):
        raise GenpruneError(
            f"{type(model).__name__} has no gradient checkpointing of its blocks; expected a host with "
            "enable_gradient_checkpointing(). Pass block_checkpointing=False."
        )
    return None if activation_memory is None else KeptGraphs(memory_bytes(activation_memory))


def _check_repeatable(model: nn.Module, slot: str) -> None:
    """Raises `GenpruneError` where a call made again could not give the same output."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise GenpruneError(
                f"'{name}' of pipe.{slot} drops at random (p = {module.p}); expected the same output each time a call "
                f"is made. Call pipe.{slot}.eval() first."
            )
    if getattr(model, "is_cache_enabled", False):
        raise GenpruneError(
            f"pipe.{slot} has a cache of earlier steps, which a call made again would not find. Call "
            f"pipe.{slot}.disable_cache() first."
        )


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
