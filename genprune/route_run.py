"""Where a router sends prompts, what that costs, and pictures of a routed pipeline: what `genprune route` does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from genprune.errors import BadCalibrationData, GenpruneError, PlanMismatch
from genprune.files import whole_folder
from genprune.model_source import open_source
from genprune.prune_run import FolderInTheWay, disk_errors, prompt_lines
from genprune.routers.balance import RouteStatistics
from genprune.routers.encoders import PooledTextEncoder
from genprune.routers.router_format import CONFIG, load_router
from genprune.routers.words import Word, typical_words

ROUTED, ROUTER = "routed_config.json", "router"


@dataclass(frozen=True)
class RoutedPrompt:
    """Where one prompt goes.

    Attributes:
        share: MACs of that expert, of the dense model's.
        similarity: of the prompt's architecture to the expert's code, in [-1, 1].
        unfamiliar: why the prompt is unlike the training prompts; None where it is not.
    """

    prompt: str
    expert: int
    share: float
    similarity: float
    unfamiliar: str | None


@dataclass(frozen=True)
class RouteResult:
    """What `genprune route` prints.

    Attributes:
        router: its folder.
        summary, report: of the router, as JSON and to read.
        routes: one a prompt, in the order given; empty for a router by timestep.
        statistics: of the prompts, as JSON; None without routes.
        words: expert -> its most typical words; empty where they were not asked for.
        drawn: the pictures' files.
    """

    router: str
    summary: dict[str, Any]
    report: str = field(repr=False)
    routes: list[RoutedPrompt]
    statistics: dict[str, Any] | None = None
    words: Mapping[int, list[Word]] = field(default_factory=dict)
    drawn: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["words"] = {str(expert): [asdict(word) for word in words] for expert, words in self.words.items()}
        return {"format_version": 1} | {name: value for name, value in values.items() if name != "report"}

    def lines(self) -> list[str]:
        """The result to read."""
        told = [self.report]
        if self.routes:
            told += ["", "expert   MACs  similarity  prompt"]
        for route in self.routes:
            told.append(f"{route.expert:>6} {route.share:>6.1%} {route.similarity:>11.3f}  {route.prompt}")
            if route.unfamiliar:
                told.append(f"{'':>27}unlike the training prompts: {route.unfamiliar}")
        if self.statistics is not None:
            told += ["", "expert  prompts   here  training   MACs"]
            count = self.statistics["prompts"]
            for expert, here in enumerate(self.statistics["counts"]):
                usage, share = self.statistics["usage"][expert], self.statistics["shares"][expert]
                told.append(f"{expert:>6} {here:>8,} {here / count:>6.1%} {usage:>9.1%} {share:>6.1%}")
            told.append(
                f"{count:,} prompts at {self.statistics['mean_share']:.1%} of the dense MACs on average, trained for "
                f"{self.statistics['target']:.1%}"
            )
            if self.statistics["drift"]:
                told.append(self.statistics["drift"])
        if self.words:
            told += ["", "words of each expert, most typical first (log-odds against the other experts)"]
        for expert, words in self.words.items():
            listed = ", ".join(f"{word.text} {word.log_odds:+.1f}" for word in words)
            told.append(f"{expert:>6}  {listed or 'none'}")
        if self.drawn:
            told += ["", f"{len(self.drawn)} pictures written to {Path(self.drawn[0]).parent}"]
        return told


def read_prompts(given: Sequence[str] | None, file: Path | None) -> list[str]:
    """Prompts of the command line, then those of a file. Raises `BadCalibrationData`."""
    return [*(given or ()), *(prompt_lines(file) if file is not None else ())]


def route_prompts(
    place: str,
    prompts: Sequence[str],
    *,
    base: str | None = None,
    encoder: str | None = None,
    unfamiliar: str = "largest",
    capacity: bool = False,
    words: int = 0,
    draw: Path | None = None,
    steps: int = 25,
    batch_size: int = 16,
    seed: int = 0,
    device: str = "cpu",
    options: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> RouteResult:
    """Route prompts, and draw them where a folder is given.

    Args:
        place: folder of a router or of a routed pipeline.
        prompts: may be empty for a router by timestep that does not draw.
        base: the dense pipeline, where a router's folder alone does not say how its prompts are read, or to draw.
        encoder: the sentence encoder, where it is not where the router's file says.
        unfamiliar, capacity: see `PromptRouter.route`.
        words: typical words of each expert; 0: none.
        draw: a new folder for pictures.
        steps, seed, options: of the pipeline's call; picture i is drawn from noise of seed + i.
        batch_size: prompts a call.
        say: told what is going on, one line a step.

    Raises:
        GenpruneError: no router is there, or it cannot be read; no prompts; `draw` without a pipeline, or it exists.
    """
    if draw is not None and draw.exists():
        raise FolderInTheWay(f"'{draw}' exists; expected a new folder for pictures. Pass another --draw.")
    router, routed = _opened(place, base, encoder, draw is not None, say)
    if not prompts and (router.kind == "prompt" or draw is not None):
        raise BadCalibrationData("no prompts are given; expected some to route. Pass --prompt TEXT or --prompts FILE.")
    experts, told, statistics = None, [], None
    if router.kind == "prompt":
        routes = router.route(list(prompts), unfamiliar=unfamiliar, capacity=capacity)
        experts, counted = routes.experts, RouteStatistics.of(router)
        counted.update(routes)
        statistics = counted.to_json()
        told = [
            RoutedPrompt(prompt, expert, router.shares[expert], float(routes.similarities[row, expert]), reason)
            for row, (prompt, expert, reason) in enumerate(zip(prompts, experts, routes.unfamiliar, strict=True))
        ]
    elif capacity or words:
        raise GenpruneError(
            f"'{place}' is a router by timestep, where every prompt takes all experts; expected one by prompt for "
            "--capacity and --map. Leave them out."
        )
    typical = typical_words(list(prompts), experts, words) if words else {}
    drawn = []
    if draw is not None:
        drawn = _drawn(routed.to(device), prompts, experts, draw, steps, batch_size, seed, dict(options or {}), say)
    return RouteResult(place, router.summary(), router.report(), told, statistics, typical, drawn)


def _opened(
    place: str, base: str | None, encoder: str | None, draws: bool, say: Callable[[str], None]
) -> tuple[Any, Any]:
    """The router, and the routed pipeline where it is needed, else None."""
    import genprune as gp

    folder = Path(place).expanduser()
    if (folder / ROUTED).is_file():
        if not draws and (encoder is not None or not _reads_with_pipeline(folder / ROUTER)):
            return load_router(folder / ROUTER, encoder=encoder), None
        say(f"Loading the routed pipeline {place}")
        given = {} if base is None else {"base": open_source(base).load()}
        routed = gp.pipelines.RoutedPipeline.from_pretrained(folder, encoder=encoder, **given)
        return routed.router, routed
    if not (folder / CONFIG).is_file():
        found = f"has neither {ROUTED} nor {CONFIG}" if folder.is_dir() else "is no folder"
        raise PlanMismatch(
            f"'{place}' {found}; expected a router's folder or a routed pipeline's. Pass what router.save_pretrained, "
            "RoutedPipeline.save_pretrained or scripts/train_router.py wrote."
        )
    if base is None and draws:
        raise GenpruneError(
            f"'{place}' is a router without its pipeline; expected that to draw. Pass --base with the dense pipeline, "
            "or the folder of a routed pipeline."
        )
    if base is None and encoder is None and _reads_with_pipeline(folder):
        raise PlanMismatch(
            f"the router in '{place}' reads prompts with its pipeline's text encoder, which its folder does not hold; "
            "expected the dense pipeline too. Pass --base MODEL."
        )
    pipe = None
    if base is not None:
        say(f"Loading {base}")
        pipe = open_source(base).load()
    router = load_router(folder, encoder=encoder, pipe=pipe)
    return router, gp.route_pipeline(pipe, router) if draws else None


def _reads_with_pipeline(folder: Path) -> bool:
    """Whether prompts are encoded by the pipeline's own text encoder; what is damaged is told when it is loaded."""
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8"))["encoder"]["kind"] == PooledTextEncoder.kind
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _drawn(
    routed: Any,
    prompts: Sequence[str],
    experts: Sequence[int] | None,
    folder: Path,
    steps: int,
    batch_size: int,
    seed: int,
    options: dict[str, Any],
    say: Callable[[str], None],
) -> list[str]:
    """Pictures by the routes that were told, so that they do not depend on how prompts are batched."""
    say(f"Drawing {len(prompts)} pictures")
    routed.set_progress_bar_config(disable=True)
    width = max(4, len(str(len(prompts) - 1)))
    names = [f"{number:0{width}}.png" for number in range(len(prompts))]
    with disk_errors(folder), whole_folder(folder) as stage:
        for first in range(0, len(prompts), batch_size):
            rows = range(first, min(first + batch_size, len(prompts)))
            given = {} if experts is None else {"expert": [experts[row] for row in rows]}
            generators = [torch.Generator("cpu").manual_seed(seed + row) for row in rows]
            called = routed(
                [prompts[row] for row in rows],
                num_inference_steps=steps,
                generator=generators,
                **given,
                **options,
            )
            for row, picture in zip(rows, called.images, strict=True):
                picture.save(stage / names[row], format="PNG")
    return [str(folder / name) for name in names]
