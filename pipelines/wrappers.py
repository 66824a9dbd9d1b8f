"""One line each: a pruned, a routed or an accelerated pipeline from a stock one (SD, SDXL, SD3, FLUX, ...)."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genprune.cutting import cut
from genprune.errors import GenpruneError, UnsupportedModel, nearest
from genprune.families import denoiser, denoiser_slot
from genprune.methods import Method
from genprune.pipelines.loading import load_pipeline
from genprune.plan import PruningPlan
from genprune.planning import make_plan
from genprune.recovery import NormalizedDistillation
from genprune.recovery import recover as recovered


def prune_pipeline(
    base: Any,
    how: Method | PruningPlan | str | os.PathLike,
    *,
    prompts: Sequence[str] | None = None,
    recover: NormalizedDistillation | None = None,
    data: Any = None,
    output_dir: str | os.PathLike | None = None,
    resume: bool = False,
    pipeline_options: Mapping[str, Any] | None = None,
    progress: bool = True,
    **loading: Any,
) -> Any:
    """A smaller pipeline of the same stock class: planned, cut, and recovered where `recover` says how.

    Args:
        base: a pipeline, a folder or a hub id. A pipeline that is given stays dense and shares its other components
            with the result; `gp.cut(pipe, plan)` cuts it in place instead, without memory for a second denoiser.
        how: a method such as `gp.EcoDiff(keep=0.8)`, a plan, or the path of one.
        prompts: that the method calibrates on, and that the recovery trains on.
        recover: trains what is left against the dense pipeline. None: no training.
        data: of the recovery: latents or pictures, one a prompt. None: the dense pipeline draws them.
        output_dir: gets `masks`, of a method that trains, and `recovery`, with their checkpoints.
        resume: go on from these.
        pipeline_options: keyword arguments of the pipeline's call, such as height and width.
        progress: show progress bars.
        **loading: of `gp.load_pipeline`, such as `torch_dtype`, where `base` is a folder or a hub id.

    Returns:
        A stock pipeline with a cut denoiser; `save_pretrained` writes it. A recovery with `lora_rank` leaves its LoRA
        on it as an adapter.

    Raises:
        GenpruneError: what `gp.make_plan`, `gp.cut` and `gp.recover` raise.
    """
    given = not isinstance(base, (str, os.PathLike))
    _check_how(how)
    if given and loading:
        raise GenpruneError(
            f"{', '.join(sorted(loading))} belong to loading, and a {type(base).__name__} is given; expected them "
            "with a folder or a hub id. Leave them out."
        )
    if not given and recover is None and not isinstance(how, Method):
        return load_pipeline(base, how, **loading)
    dense = base if given else load_pipeline(base, **loading)
    if given and denoiser_slot(base) is None:
        raise UnsupportedModel(
            f"{type(base).__name__} is no pipeline with a denoiser; expected a stock diffusers pipeline. Cut a bare "
            "model with gp.cut(model, plan)."
        )
    folder = None if output_dir is None else Path(output_dir)
    shared = {"pipeline_options": pipeline_options, "progress": progress}
    plan = how
    if isinstance(how, Method):
        training = {"output_dir": folder and folder / "masks", "resume": resume} if how.trains else {}
        plan = make_plan(dense, how, prompts=prompts, **shared, **training)
    if not given and recover is None:
        return cut(dense, plan)
    pruned = copy.copy(dense)
    pruned.__dict__[denoiser_slot(dense)] = copy.deepcopy(denoiser(dense))
    cut(pruned, plan)
    if recover is not None:
        training = {"output_dir": folder and folder / "recovery", "resume": resume and folder is not None}
        recovered(pruned, dense, recover, prompts=prompts, data=data, **shared, **training)
    return pruned


def _check_how(how: Any) -> None:
    if not isinstance(how, (Method, PruningPlan, str, os.PathLike)):
        raise GenpruneError(
            f"got {how!r}; expected a method such as gp.Taylor(keep=0.7), a plan, or the path of one. Pass one of "
            "them."
        )


def route_pipeline(base: Any, router: Any, *, encoder: Any = None, **settings: Any) -> Any:
    """A pipeline that draws every prompt with the expert that a router chooses for it.

    Args:
        base: the dense pipeline that the router was trained for, its folder or hub id.
        router: a `PromptRouter` or `TimestepRouter`, or the folder of one.
        encoder: the sentence encoder of a router's folder, where it is not where the router's file says.
        **settings: of `RoutedPipeline`, such as `store="materialised"`; the others are of `gp.load_pipeline`, such as
            `torch_dtype`, where `base` is a folder or a hub id.

    Returns:
        A `RoutedPipeline`: called like the stock pipeline, which it stands around.

    Raises:
        PlanMismatch: the router is for another base, or its folder is damaged.
        GenpruneError: a setting that is none, or arguments of loading beside a pipeline.
    """
    from genprune.pipelines.routed import RoutedPipeline
    from genprune.routers.router_format import load_router

    known = list(inspect.signature(RoutedPipeline.__init__).parameters)[3:]  # after self, pipe and router
    loading = {name: settings.pop(name) for name in list(settings) if name not in known}
    given = not isinstance(base, (str, os.PathLike))
    if given and loading:
        name = next(iter(loading))
        raise GenpruneError(
            f"'{name}' is no setting of a routed pipeline{nearest(name, known)}, and a {type(base).__name__} that is "
            f"given is loaded already; expected some of {', '.join(known)}. Rename it or leave it out."
        )
    pipe = base if given else load_pipeline(base, **loading)
    if isinstance(router, (str, os.PathLike)):
        router = load_router(router, encoder=encoder, pipe=pipe)
    return RoutedPipeline(pipe, router, **settings)


def accelerate_pipeline(pipe: Any, *, tokens: Any = None, cache: Any = None) -> Any:
    """Less work at every step without training, in place: fewer tokens, or blocks that are left out where little
    changed.

    Nothing else is touched. What hosts have of their own goes on top: `pipe.unet.compile()`,
    `pipe.unet.to(memory_format=torch.channels_last)`, attention backends, quantisation.

    Args:
        pipe: a stock pipeline, dense or pruned.
        tokens: share of the image tokens that stay, in (0, 1), or settings of `gp.prune_tokens`, which this calls.
            `genprune.tokens.handle.handle_of(pipe.unet).remove()` takes it off.
        cache: the threshold of diffusers' first-block cache, such as 0.08, or a cache configuration of diffusers for
            `transformer.enable_cache`, which this calls; `disable_cache()` takes it off. Transformers that have it.

    Returns:
        `pipe` itself.

    Raises:
        GenpruneError: neither is given, or both: a cache adds up outputs of steps with different tokens.
        UnsupportedModel: the model has no cache, or is a kind whose tokens cannot be reduced.
    """
    from genprune.tokens.attached import reduced

    if denoiser_slot(pipe) is None or hasattr(pipe, "router"):
        raise UnsupportedModel(
            f"{type(pipe).__name__} is no stock pipeline with a denoiser; expected one. Of a routed pipeline, pass "
            "routed.expert_pipeline(k)."
        )
    model = denoiser(pipe)
    if tokens is None and cache is None:
        raise GenpruneError("neither tokens nor cache is given; expected one of them. Pass tokens=0.75, say.")
    cached = getattr(model, "is_cache_enabled", False)
    if (tokens is not None or reduced(model)) and (cache is not None or cached):
        raise GenpruneError(
            "tokens and a cache on one denoiser; expected one of them: the cache adds what a block gave in another "
            "step, where other tokens were left. Take the first off (handle_of(model).remove(), "
            "model.disable_cache()), or leave one out."
        )
    if tokens is not None:
        _reduce_tokens(pipe, tokens)
    else:
        _enable_cache(model, cache)
    return pipe


def _reduce_tokens(pipe: Any, tokens: Any) -> None:
    from genprune.tokens.diffusion import DiffusionTokens
    from genprune.tokens.handle import prune_tokens

    share = isinstance(tokens, (int, float)) and not isinstance(tokens, bool)
    prune_tokens(pipe, DiffusionTokens(tokens=float(tokens)) if share else tokens)


def _enable_cache(model: Any, cache: Any) -> None:
    if not hasattr(model, "enable_cache"):
        raise UnsupportedModel(
            f"{type(model).__name__} has no cache in the installed diffusers; expected a transformer with "
            "enable_cache, such as Flux's. Pass tokens=0.75 instead, which every supported denoiser takes."
        )
    if isinstance(cache, (int, float)) and not isinstance(cache, bool):
        from diffusers import FirstBlockCacheConfig

        if not 0 < cache < float("inf"):
            raise GenpruneError(f"cache={cache!r}; expected a threshold above 0. Pass cache=0.08, say.")
        cache = FirstBlockCacheConfig(threshold=float(cache))
    try:
        model.enable_cache(cache)
    except ValueError as error:
        raise GenpruneError(
            f"diffusers refuses this cache ({error}); expected a threshold, or a cache configuration of diffusers. "
            "Pass cache=0.08, say."
        ) from None
