"""`RoutedPipeline`: a stock pipeline that draws each prompt with the expert that a router chooses for it."""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from genprune.errors import GenpruneError, PlanMismatch, UnsupportedModel
from genprune.families import denoiser, denoiser_slot
from genprune.files import check_replaceable, whole_folder
from genprune.pipelines.grouping import Rows, joined_outputs, rows_of
from genprune.pipelines.loading import load_pipeline
from genprune.pipelines.routed_format import CONFIG, PIPELINE, ROUTER, RoutedSettings, read_config, write_config
from genprune.pipelines.step_experts import StepExperts
from genprune.pipelines.stores import ExpertStore, MaterialisedStore, ReorderedStore
from genprune.routers.balance import RouteStatistics
from genprune.routers.experts import Routes
from genprune.routers.router_format import load_router

_BEFORE = "call it on the stock pipeline before RoutedPipeline(pipe, router)"
_MERGE = "load and fuse it on the stock pipeline, unload it there, and wrap that with check_weights=False"
# Methods of stock pipelines that would reach one expert alone, or hold weights that the store moves.
_REFUSED = {
    "enable_model_cpu_offload": "use .to(device): experts share one copy of the weights",
    "enable_sequential_cpu_offload": "use .to(device): experts share one copy of the weights",
    "enable_group_offload": "use .to(device): experts share one copy of the weights",
    "load_lora_weights": _MERGE,
    "fuse_lora": _MERGE,
    "unfuse_lora": _MERGE,
    "set_adapters": _MERGE,
    "load_ip_adapter": "use it on routed.expert_pipeline(k), where no attention that it hooks into was cut",
    "fuse_qkv_projections": "use it on routed.expert_pipeline(k)",
    "unfuse_qkv_projections": "use it on routed.expert_pipeline(k)",
    "enable_freeu": _BEFORE,
    "disable_freeu": _BEFORE,
    "enable_attention_slicing": _BEFORE,
    "disable_attention_slicing": _BEFORE,
    "enable_xformers_memory_efficient_attention": _BEFORE,
    "disable_xformers_memory_efficient_attention": _BEFORE,
    "register_modules": "set the component before RoutedPipeline(pipe, router)",
    "from_pipe": "use routed.unwrapped, the stock pipeline",
}


class RoutedPipeline:
    """Stands around a stock pipeline of any class and is called like it.

    With a `PromptRouter` the prompts of a call are grouped by expert, each group runs as one batch of the stock call
    on a really smaller denoiser, and the pictures come back in the order of the prompts. With a `TimestepRouter` all
    prompts run in one batch whose denoiser changes with the noise level. Everything that is not here is the stock
    pipeline's: `routed.scheduler`, `routed.vae`, `routed.scheduler = ...`.

    Args:
        pipe: a stock text-to-image pipeline with its dense denoiser, without gates, adapters and offloading of the
            denoiser. The object itself is left alone, its components are shared: with a reordered store its denoiser
            runs again after `unwrapped` was asked for.
        router: a `PromptRouter` or a `TimestepRouter` of this base.
        store, resident, unfamiliar, capacity: see `RoutedSettings`.
        check_weights: refuse weights that the router was not trained on. False for a fine-tune that is meant.

    Attributes:
        router: that chooses.
        store: the experts.
        settings: `RoutedSettings`.
        active_rows: while a group runs (`callback_on_step_end`), the indices of its prompts; otherwise None.

    Raises:
        PlanMismatch: the router is of another model or of other weights.
        UnsupportedModel: the pipeline has no denoiser, or takes no prompt.
    """

    def __init__(
        self,
        pipe: Any,
        router: Any,
        store: str = "reordered",
        *,
        resident: int = 1,
        unfamiliar: str = "largest",
        capacity: bool = False,
        check_weights: bool = True,
    ):
        settings = RoutedSettings(store, resident, unfamiliar, capacity)
        slot = _slot(pipe, router)
        model = denoiser(pipe)
        router.check_base(model, weights=check_weights)
        experts: ExpertStore
        if settings.store == "reordered":
            experts = ReorderedStore(model, router.experts)
        else:
            experts = MaterialisedStore(model, router.experts, resident=settings.resident)
        own = {"router": router, "store": experts, "settings": settings, "active_rows": None}
        own |= {"_pipe": copy.copy(pipe), "_slot": slot, "_statistics": _statistics(router)}
        own["_steps"] = StepExperts(experts, router, pipe.scheduler) if router.kind == "timestep" else None
        self.__dict__.update(own)

    # ---- drawing ----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *args: Any,
        expert: int | Sequence[int] | None = None,
        **kwargs,
    ) -> Any:
        """What the stock pipeline returns, pictures in the order of the prompts.

        Arguments that have one entry a prompt (texts, embeddings, images) or a picture (latents, generators) go with
        their prompts; all others are for every group. A text that is given once is for every prompt. One generator
        for several pictures seeds one for each of them, in order, so that a picture does not depend on the routes
        of the others; a generator for one picture is used as it is. Without a generator pictures come from torch's
        global state, in the order of the groups. An interrupt (`routed._interrupt = True`) ends the running group as
        it ends a stock call, and each later group after its first step.

        Args:
            prompt: one text or several. None where `prompt_embeds` and `expert` are given.
            *args, **kwargs: of the stock pipeline's call.
            expert: draw with this expert instead of asking the router; or one for each prompt.

        Returns:
            The stock output object, or a tuple with `return_dict=False`. With `output_type="latent"` as with pictures.

        Raises:
            GenpruneError: an argument has another number of entries than there are prompts, an expert is unknown, or
                nothing says which expert an embedding is for. Errors of the stock pipeline come as they are, with a
                note that says which prompts ran.
        """
        given = self._bound(prompt, args, kwargs)
        if self._steps is not None:
            return self._draw_by_steps(given, expert)
        rows = rows_of(given)
        routes = self._routes(rows, expert)
        experts = routes.experts if isinstance(routes, Routes) else routes
        groups: dict[int, list[int]] = {}
        for index in sorted(range(rows.prompts), key=lambda row: experts[row]):
            groups.setdefault(experts[index], []).append(index)
        outputs: list[Any] = []
        for number, members in groups.items():
            # a stock call begins by forgetting the interrupt of the one before
            stop = bool(outputs) and getattr(self._pipe, "_interrupt", False)
            outputs.append(self._draw_group(number, members, rows, stop))
        self._statistics.update(routes, runs=rows.pictures)
        return joined_outputs(outputs, [rows.pictures_of(members) for members in groups.values()])

    def _bound(self, prompt: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name. An unknown or a missing one is the stock pipeline's own `TypeError`."""
        positional = (*(() if prompt is None else (prompt,)), *args)
        signature = inspect.signature(type(self._pipe).__call__)
        try:
            bound = signature.bind(self._pipe, *positional, **kwargs).arguments
        except TypeError:
            self._pipe(*positional, **kwargs)  # raises before it does anything
            raise
        given = dict(list(bound.items())[1:])
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        return given

    def _routes(self, rows: Rows, expert: int | Sequence[int] | None) -> Routes | tuple[int, ...]:
        if expert is None:
            if rows.texts is None:
                raise GenpruneError(
                    f"{rows.prompts} embeddings and no prompt; expected a prompt, which is what the router reads. "
                    "Pass expert= (an index, or one for each row), such as routed.router.route(texts).experts."
                )
            policy = {"unfamiliar": self.settings.unfamiliar, "capacity": self.settings.capacity}
            return self.router.route(rows.texts, **policy)
        given = expert.tolist() if hasattr(expert, "tolist") else expert  # numbers, arrays and tensors of others
        chosen = list(given) if isinstance(given, (list, tuple)) else [given] * rows.prompts
        chosen = [each.item() if hasattr(each, "item") else each for each in chosen]
        count = len(self.router.experts)
        wrong = [e for e in chosen if isinstance(e, bool) or not isinstance(e, int) or not 0 <= e < count]
        if wrong or len(chosen) != rows.prompts:
            raise GenpruneError(
                f"expert={expert!r} for {rows.prompts} prompts; expected an index from 0 to {count - 1}, or one for "
                "each prompt. routed.router.report() lists the experts."
            )
        return tuple(chosen)

    def _draw_group(self, number: int, members: list[int], rows: Rows, stop: bool) -> Any:
        with self._running(number, members, rows.texts):
            self._pipe.__dict__[self._slot] = self.store.model  # nothing holds a copy that the store lets go
            self._pipe.__dict__[self._slot] = self.store.activate(number)
            given = rows.of(members)
            if stop:
                given["callback_on_step_end"] = _interrupt
            return self._pipe(**given)

    def _draw_by_steps(self, given: dict[str, Any], expert: Any) -> Any:
        if expert is not None:
            raise GenpruneError(
                f"expert={expert!r} with a router by timestep, whose experts all take part in every picture; expected "
                "none. Leave it out, or draw with routed.expert_pipeline(k)."
            )
        self._pipe.__dict__[self._slot] = self._steps
        self._steps.begin(self._pipe.scheduler)
        output = self._pipe(**given)
        self._statistics.update(tuple(self._steps.experts_of_calls))
        return output

    @contextmanager
    def _running(self, number: int, members: list[int], texts: list[str] | None) -> Iterator[None]:
        """Tell which prompts run with which expert: to callbacks, in the progress bar, and in errors."""
        before = getattr(self._pipe, "_progress_bar_config", None)
        settings = dict(before or {})
        what = f"expert {number}, {len(members)} prompt{'s' if len(members) > 1 else ''}"
        settings["desc"] = f"{settings['desc']}: {what}" if settings.get("desc") else what
        self.__dict__["active_rows"] = tuple(members)
        self._pipe.set_progress_bar_config(**settings)
        try:
            yield
        except Exception as error:
            shown = ", ".join(str(i) if texts is None else f"{i} ({texts[i][:40]!r})" for i in members[:8])
            error.add_note(f"expert {number} was running prompts {shown}{', ...' if len(members) > 8 else ''}")
            raise
        finally:
            self.__dict__["active_rows"] = None
            self._pipe.set_progress_bar_config(**(before or {}))

    # ---- what was drawn ---------------------------------------------------------------------------------------------

    def statistics(self) -> RouteStatistics:
        """Prompts of each expert in calls that came to their end, and the true mean of their MACs.

        With a `TimestepRouter`: calls of the denoiser instead of prompts.
        """
        return self._statistics

    def reset_statistics(self) -> None:
        """Count from zero again."""
        self._statistics.reset()

    # ---- the stock pipeline -----------------------------------------------------------------------------------------

    @property
    def unwrapped(self) -> Any:
        """A stock pipeline with the dense denoiser, as it was to the bit. The next routed call takes it again."""
        self._pipe.__dict__[self._slot] = self.store.dense()
        return self._pipe

    def expert_pipeline(self, expert: int) -> Any:
        """A stock pipeline with one expert, really cut, with weights of its own; `save_pretrained` writes it.

        Other components are shared with this pipeline, but for the scheduler.
        """
        model = self.store.copy(expert)
        small = copy.copy(self._pipe)
        small.__dict__[self._slot] = model
        small.register_modules(**{self._slot: model, "scheduler": copy.deepcopy(self._pipe.scheduler)})
        return small

    def to(self, *args: Any, **kwargs: Any) -> RoutedPipeline:
        """Move or cast everything once, as the stock pipeline's `to`; the router stays on the CPU."""
        self.unwrapped.to(*args, **kwargs)
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_pipe" not in self.__dict__:
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        if name in _REFUSED and hasattr(self._pipe, name):
            return functools.partial(_refuse, name)
        return getattr(self._pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in (self._slot, "router", "store", "settings", "active_rows") or name in vars(type(self)):
            raise GenpruneError(
                f"'{name}' of a routed pipeline cannot be set: router, experts and denoiser belong together. Build a "
                "new RoutedPipeline(pipe, router)."
            )
        setattr(self._pipe, name, value)

    def __repr__(self) -> str:
        return (
            f"RoutedPipeline({type(self._pipe).__name__}, {type(self.router).__name__} of "
            f"{len(self.router.experts)} experts, store={self.settings.store!r})"
        )

    # ---- on disk ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike, base: str | None = None, **kwargs: Any) -> None:
        """Write the router, and the dense stock pipeline or its name. Nothing is left half-written.

        Args:
            folder: gets `routed_config.json`, `router/` and `pipeline/`.
            base: hub id or path of the stock pipeline, which is then not written.
            **kwargs: of the stock pipeline's `save_pretrained`.

        Raises:
            PlanMismatch: `folder` is a file or holds something else.
        """
        check_replaceable(folder, CONFIG, "a routed pipeline")
        with whole_folder(folder) as temporary:
            self.router.save_pretrained(temporary / ROUTER)
            if base is None:
                self.unwrapped.save_pretrained(temporary / PIPELINE, **kwargs)
            write_config(temporary, self.settings, PIPELINE if base is None else str(base))

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, *, base: Any = None, encoder: Any = None, check_weights: bool = True, **kwargs
    ) -> RoutedPipeline:
        """Read what `save_pretrained` wrote.

        Args:
            folder: on this machine.
            base: the stock pipeline, its folder or hub id, where it is not the one that the folder names.
            encoder: the router's sentence encoder, where it is not where the router's file says.
            check_weights: see `RoutedPipeline`.
            **kwargs: `store`, `resident`, `unfamiliar` and `capacity` in place of the saved ones; the others are for
                `DiffusionPipeline.from_pretrained` (`torch_dtype`, components, ...).

        Raises:
            PlanMismatch: a part is missing, damaged, of a newer genprune, or of another base.
        """
        saved, named = read_config(folder)
        settings = {name: kwargs.pop(name, value) for name, value in saved.to_json().items()}
        if base is None:
            inside = named == PIPELINE
            base = Path(folder) / PIPELINE if inside else named
            if inside and not base.is_dir():
                raise PlanMismatch(
                    f"'{folder}' has no folder '{PIPELINE}'; expected the stock pipeline there. Restore it, or pass "
                    "base= with the pipeline, its folder or hub id."
                )
        pipe = load_pipeline(base, **kwargs) if isinstance(base, (str, os.PathLike)) else base
        router = load_router(Path(folder) / ROUTER, encoder=encoder, pipe=pipe)
        return cls(pipe, router, **settings, check_weights=check_weights)


def _slot(pipe: Any, router: Any) -> str:
    """Where the denoiser stands. Raises `UnsupportedModel` for what cannot be routed."""
    if isinstance(pipe, RoutedPipeline):
        raise UnsupportedModel("the pipeline is routed already; expected a stock one. Pass routed.unwrapped.")
    slot = denoiser_slot(pipe)
    if slot is None:
        raise UnsupportedModel(
            f"{type(pipe).__name__} is a bare model; expected a stock pipeline with a denoiser. Use "
            "ReorderedStore(model, experts) for a bare model."
        )
    if router.kind == "prompt" and "prompt" not in inspect.signature(type(pipe).__call__).parameters:
        raise UnsupportedModel(
            f"{type(pipe).__name__} takes no prompt; expected a text-to-image pipeline. Use a TimestepRouter for it."
        )
    return slot


def _statistics(router: Any) -> RouteStatistics:
    if router.kind == "prompt":
        return RouteStatistics.of(router)
    return RouteStatistics(router.shares, [0.0] * len(router.experts), router.target)  # no drift: steps, not prompts


def _interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Callback of a group whose call was interrupted before it began."""
    pipe._interrupt = True
    return {}


def _refuse(name: str, *args: Any, **kwargs: Any) -> None:
    raise GenpruneError(f"{name} on a routed pipeline would reach one expert alone; expected none. {_REFUSED[name]}.")
